"""Noise of a given size, to measure throughput without a disk."""

from __future__ import annotations

import torch

from training.data import Images
from training.seeds import mix
from training.types import NonNegativeInt, PositiveInt


class Noise:
    """A few images of noise that come again and again; labels go round."""

    def __init__(self, count: int, shape: tuple[int, int, int], classes: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(mix(seed))
        self.images = torch.randn(min(count, 64), *shape, generator=generator)
        self.count, self.classes = count, classes

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index % len(self.images)], index % self.classes


class Synthetic(Images):
    """Noise: nothing is to be learnt from it, only how fast training is.

    Args:
        train_images: Training images an epoch.
        validation_images: Validation images.
        size: Their height and width.
        channels: Their channels.
        classes: Number of labels.
        batch_size: Images a step, over all ranks (and before accumulation).
        workers: Processes that load images, for each rank.
        seed: Of the order and the noise; `seed_everything` unless given.
    """

    def __init__(
        self,
        train_images: PositiveInt = 128_000,
        validation_images: PositiveInt = 1_000,
        size: PositiveInt = 224,
        channels: PositiveInt = 3,
        classes: PositiveInt = 1000,
        batch_size: PositiveInt = 64,
        workers: NonNegativeInt = 0,
        seed: NonNegativeInt = 0,
    ) -> None:
        super().__init__(batch_size, workers, seed)
        self.counts, self.shape = (train_images, validation_images), (channels, size, size)
        self.num_classes, self.in_channels = classes, channels

    def load(self) -> tuple[Noise, Noise]:
        train, validation = self.counts
        return (
            Noise(train, self.shape, self.num_classes, self.seed),
            Noise(validation, self.shape, self.num_classes, self.seed + 1),
        )
