"""scikit-learn's 1797 handwritten digits: real data without a download."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from training.data import Held, Images
from training.types import NonNegativeInt, OpenUnitInterval, PositiveInt


class Digits(Images):
    """Grey 8x8 images of ten digits, split at random in equal shares of each digit.

    Args:
        validation_fraction: Share of the images that are held out.
        batch_size: Images a step, over all ranks (and before accumulation).
        workers: Processes that load images, for each rank.
        seed: Of the order and the random transforms; `seed_everything` unless given.
    """

    num_classes, in_channels = 10, 1

    def __init__(
        self,
        validation_fraction: OpenUnitInterval = 0.25,
        batch_size: PositiveInt = 64,
        workers: NonNegativeInt = 0,
        seed: NonNegativeInt = 0,
    ) -> None:
        super().__init__(batch_size, workers, seed)
        self.validation_fraction = validation_fraction

    def load(self) -> tuple[Held, Held]:
        pixels, labels = load_digits(return_X_y=True)
        images = torch.as_tensor(pixels, dtype=torch.float32).div(8).sub(1).reshape(-1, 1, 8, 8)
        try:
            train, held_out = train_test_split(
                range(len(labels)),
                test_size=self.validation_fraction,
                random_state=0,
                stratify=labels,
            )
        except ValueError as error:
            raise ValueError(
                f"data.validation_fraction: {self.validation_fraction} cannot be used ({error}); "
                "take 0.25"
            ) from None
        labels = torch.as_tensor(labels)
        return Held(images[train], labels[train]), Held(images[held_out], labels[held_out])
