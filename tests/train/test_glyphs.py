"""scripts/train.py: rendered characters, bent batch by batch."""

import math

import pytest
import torch

pytest.importorskip("lightning", reason="lightning is not installed")

from training.glyphs import Bent, Characters, render, sampling_grid


def test_sixteen_fonts_have_all_characters():
    pictures = render(32)
    assert pictures.shape == (62, 16, 1, 32, 32) and pictures.min() == 0 and pictures.max() == 1
    assert (pictures.flatten(2).sum(2) > 4).all()  # something is drawn


def test_images_are_a_function_of_seed_epoch_and_index():
    images = Bent(Characters(100, 16), seed=3, noise=0.1)
    ats = [(epoch, index) for epoch in (0, 1) for index in (4, 66, 99)]
    batch = images.__getitems__(ats)
    for at, (image, label) in zip(ats, batch, strict=True):
        assert torch.equal(image, images[at][0]) and label == images[at][1] == at[1] % 62
    other = Bent(images.images, seed=4, noise=0.1).__getitems__(ats)
    every = [image for image, _ in batch + other]
    assert all(not torch.equal(a, b) for n, a in enumerate(every) for b in every[:n])


def test_grid_is_the_inverse_of_the_map():
    numbers, size = torch.rand(5, 6, dtype=torch.float64), 7
    for row, grid in zip(numbers, sampling_grid(numbers, size), strict=True):
        angle, across, down, scale, left, right = row.tolist()
        angle, left, right = (
            math.radians((2 * v - 1) * d) for v, d in ((angle, 25), (left, 15), (right, 15))
        )
        turn = torch.tensor(
            [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
        )
        shear = torch.tensor([[1, math.tan(left)], [math.tan(right), 1]])
        matrix = (0.6 + 0.5 * scale) * (turn @ shear).double()
        move = torch.tensor([0.24 * (2 * across - 1), 0.24 * (2 * down - 1)])
        at = (2 * torch.arange(size) + 1) / size - 1
        y, x = torch.meshgrid(at, at, indexing="ij")
        torch.testing.assert_close(
            grid @ matrix.T + move, torch.stack((x, y), -1).double(), atol=1e-6, rtol=0
        )
