"""Characters of the fonts that ship with matplotlib, bent and noisy: no download, no end."""

from __future__ import annotations

import math
import string
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional

from training.data import Images
from training.loader import At, Seeded
from training.seeds import mix
from training.types import NonNegativeFloat, NonNegativeInt, PositiveInt

CHARACTERS = string.digits + string.ascii_letters
FONTS = ("DejaVuSans*.ttf", "DejaVuSerif*.ttf", "STIXGeneral*.ttf")


@cache
def render(size: int) -> Tensor:
    """Every character in every font, black on white: (characters, fonts, 1, size, size) in 0 … 1.

    Raises:
        OSError: If matplotlib's fonts are not where they should be.
    """
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    found = sorted(path for name in FONTS for path in folder.glob(name))
    paths = [path for path in found if "Display" not in path.name]  # which have no letters
    if not paths:
        raise OSError(f"data: no font DejaVu*.ttf in {folder}; reinstall matplotlib")
    fonts = [ImageFont.truetype(str(path), round(0.7 * size)) for path in paths]
    rows = [torch.stack([_draw(letter, font, size) for font in fonts]) for letter in CHARACTERS]
    return torch.stack(rows)


def _draw(letter: str, font: ImageFont.FreeTypeFont, size: int) -> Tensor:  # (1, size, size)
    picture = Image.new("L", (size, size))
    ImageDraw.Draw(picture).text((size / 2, size / 2), letter, 255, font, anchor="mm")
    return torch.from_numpy(np.array(picture)).float().div(255)[None]


class Characters:
    """So many of the rendered characters, each in all fonts; labels go round."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.pictures = count, render(size)

    def __len__(self) -> int:
        return self.count


class Bent(Seeded):
    """Characters in a random font, under a random affine map, of random contrast, with noise.

    Each is a function of (seed, epoch, index), of its own stream of a counter-based generator;
    a batch of them is bent at once.
    """

    def __init__(self, images: Characters, seed: int, noise: float) -> None:
        super().__init__(images, seed)
        self.noise = noise

    def __getitem__(self, at: At) -> tuple[Tensor, int]:
        return self.__getitems__([at])[0]

    def __getitems__(self, ats: list[At]) -> list[tuple[Tensor, int]]:
        pictures = self.images.pictures
        size, labels = pictures.shape[-1], [index % len(pictures) for _, index in ats]
        numbers, noise = self._draw(ats, size)
        fonts = (numbers[:, 0] * pictures.shape[1]).long()
        grid = sampling_grid(numbers[:, 1:7], size)
        bent = functional.grid_sample(pictures[labels, fonts], grid, align_corners=False)
        contrast = (0.3 + 0.7 * numbers[:, 7]) * (2 * (numbers[:, 8] < 0.5) - 1)
        images = (2 * bent - 1) * contrast[:, None, None, None] + self.noise * noise
        return list(zip(images, labels, strict=True))

    def _draw(self, ats: list[At], size: int) -> tuple[Tensor, Tensor]:
        """For each image nine numbers in 0 … 1, and normal noise: (n, 9), (n, 1, size, size)."""
        seeds = {epoch: mix(self.seed, epoch) for epoch, _ in ats}
        numbers = np.empty((len(ats), 9), np.float32)
        noise = np.empty((len(ats), 1, size, size), np.float32)
        for n, (epoch, index) in enumerate(ats):
            generator = np.random.Generator(np.random.Philox(key=[seeds[epoch], index]))
            generator.random(out=numbers[n], dtype=np.float32)
            generator.standard_normal(out=noise[n], dtype=np.float32)
        return torch.from_numpy(numbers), torch.from_numpy(noise)


def sampling_grid(numbers: Tensor, size: int) -> Tensor:  # (n, 6) in 0 … 1 -> (n, size, size, 2)
    """Where the pixels of rotated, sheared, scaled and moved pictures come from, in −1 … 1.

    The inverse of x ↦ s R(φ) S x + t: φ up to 25°, two shears S up to 15°, s from 0.6 to 1.1 and t
    up to 0.12 of the size.
    """
    angle, across, down, scale, left, right = numbers.unbind(1)
    angle, left, right = (
        (2 * a - 1) * math.radians(b) for a, b in ((angle, 25), (left, 15), (right, 15))
    )
    scale, sine, cosine, a, b = 0.6 + 0.5 * scale, angle.sin(), angle.cos(), left.tan(), right.tan()
    # (S R)⁻¹ = adj(S) R(−φ) / det S
    factor = 1 / (scale * (1 - a * b))
    rows = ((cosine + a * sine, sine - a * cosine), (-b * cosine - sine, cosine - b * sine))
    at = (2 * torch.arange(size) + 1) / size - 1
    x = at - 0.24 * (2 * across - 1)[:, None]  # (n, size); the picture is 2 wide
    y = at - 0.24 * (2 * down - 1)[:, None]
    axes = [
        (factor * p)[:, None, None] * x[:, None] + (factor * q)[:, None, None] * y[:, :, None]
        for p, q in rows
    ]
    return torch.stack(axes, -1)


class Glyphs(Images):
    """62 characters (digits and letters of both cases) in 16 fonts, grey.

    Each is drawn anew in every epoch: rotated, sheared, moved, scaled, inverted or pale, in
    noise. Validation images are others of the kind, always the same. (Some letters differ
    from their capitals in size alone, which the scaling hides: nobody reaches 100 %.)

    Args:
        train_images: Training images an epoch.
        validation_images: Validation images.
        size: Their height and width.
        noise: Standard deviation of the noise; the characters are from −1 to 1.
        batch_size: Images a step, over all ranks (and before accumulation).
        workers: Processes that load images, for each rank.
        seed: Of the order and the distortions; `seed_everything` unless given.
    """

    num_classes, in_channels = len(CHARACTERS), 1

    def __init__(
        self,
        train_images: PositiveInt = 49_600,
        validation_images: PositiveInt = 6_200,
        size: PositiveInt = 32,
        noise: NonNegativeFloat = 0.3,
        batch_size: PositiveInt = 64,
        workers: NonNegativeInt = 0,
        seed: NonNegativeInt = 0,
    ) -> None:
        super().__init__(batch_size, workers, seed)
        if size < 16:
            raise ValueError(f"data.size: {size} is too small to read; take 16 or more")
        self.counts, self.size, self.noise = (train_images, validation_images), size, noise

    def load(self) -> tuple[Characters, Characters]:
        train, validation = (Characters(count, self.size) for count in self.counts)
        return train, validation

    def seeded(self, images: Characters, seed: int) -> Bent:
        return Bent(images, seed, self.noise)
