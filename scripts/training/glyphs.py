"""Characters of the fonts that ship with matplotlib, bent and noisy: no download, no end."""

from __future__ import annotations

import string
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2 import RandomAffine

from training.data import Images
from training.types import NonNegativeFloat, NonNegativeInt, PositiveInt

CHARACTERS = string.digits + string.ascii_letters
FONTS = ("DejaVuSans[!D]*.ttf", "DejaVuSerif[!D]*.ttf", "STIXGeneral*.ttf")


@cache
def render(size: int) -> Tensor:
    """Every character in every font, black on white: (characters, fonts, 1, size, size) in 0 … 1.

    Raises:
        OSError: If matplotlib's fonts are not where they should be.
    """
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    paths = sorted(path for name in FONTS for path in folder.glob(name))
    if not paths:
        raise OSError(f"data: no font DejaVu*.ttf in {folder}; reinstall matplotlib")
    fonts = [ImageFont.truetype(str(path), round(0.7 * size)) for path in paths]
    rows = [torch.stack([_draw(letter, font, size) for font in fonts]) for letter in CHARACTERS]
    return torch.stack(rows)


def _draw(letter: str, font: ImageFont.FreeTypeFont, size: int) -> Tensor:  # (1, size, size)
    picture = Image.new("L", (size, size))
    ImageDraw.Draw(picture).text((size / 2, size / 2), letter, 255, font, anchor="mm")
    return torch.from_numpy(np.array(picture)).float().div(255)[None]


class Bent:
    """Characters under a random affine map, of random contrast, with noise."""

    def __init__(self, count: int, size: int, noise: float) -> None:
        self.count, self.noise, self.glyphs = count, noise, render(size)
        self.bend = RandomAffine([-25, 25], (0.12, 0.12), (0.6, 1.1), [-15, 15, -15, 15])

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        label = index % len(self.glyphs)
        font = int(torch.randint(self.glyphs.shape[1], ()))
        picture = self.bend(self.glyphs[label, font])
        contrast = (0.3 + 0.7 * torch.rand(())) * (1 if torch.rand(()) < 0.5 else -1)
        return 2 * contrast * picture - contrast + self.noise * torch.randn(picture.shape), label


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

    def load(self) -> tuple[Bent, Bent]:
        train, validation = (Bent(count, self.size, self.noise) for count in self.counts)
        return train, validation
