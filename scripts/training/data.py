"""What all data sets have in common: batches, ranks, seeds."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader

from training.loader import Loader, Seeded, Share
from training.types import NonNegativeInt, PositiveInt


class Images(LightningDataModule):
    """Images and their labels, as (channels, height, width) tensors and integers.

    A data set is a subclass that says `num_classes` and `in_channels` and loads its two parts.

    Args:
        batch_size: Images a step, over all ranks (and before accumulation).
        workers: Processes that load images, for each rank.
        seed: Of the order and the random transforms; `seed_everything` unless given.
    """

    num_classes: int
    in_channels: int

    def __init__(
        self, batch_size: PositiveInt = 64, workers: NonNegativeInt = 0, seed: NonNegativeInt = 0
    ) -> None:
        super().__init__()
        self.batch_size, self.workers, self.seed = batch_size, workers, seed
        self.parts: tuple[Any, Any] | None = None
        self.loader: Loader | None = None
        self.resumed: dict[str, int] | None = None

    @abstractmethod
    def load(self) -> tuple[Any, Any]:
        """The training and the validation images, each with `len` and `[index]`."""

    def setup(self, stage: str) -> None:
        if self.parts is None:
            self.parts = self.load()

    def seeded(self, images: Any, seed: int) -> Seeded:
        """One part's images as a function of epoch, index and seed."""
        return Seeded(images, seed)

    def order(self, generator: torch.Generator) -> torch.Tensor:
        """An epoch's permutation of the training images."""
        assert self.parts is not None
        return torch.randperm(len(self.parts[0]), generator=generator)

    def train_dataloader(self) -> DataLoader:
        assert self.parts is not None
        options = {"order": self.order, **self._options()}
        images = self.seeded(self.parts[0], self.seed)
        self.loader = Loader(images, self.batch_size, *self._ranks(), **options)
        if self.resumed is not None:
            self.loader.load_state_dict(self.resumed)
        return self.loader

    def state_dict(self) -> dict[str, int]:
        return {} if self.loader is None else self.loader.state_dict()

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on after the batches of a checkpoint.

        (Lightning 2.6 keeps the loader's state itself, but does not load it where the number
        of steps was asked for first, as for a learning rate.)
        """
        self.resumed = state_dict
        if self.loader is not None:
            self.loader.load_state_dict(state_dict)

    def val_dataloader(self) -> DataLoader:
        assert self.parts is not None
        rank, ranks = self._ranks()
        share = Share(self.seeded(self.parts[1], self.seed + 1), rank, ranks)
        return DataLoader(share, max(1, self.batch_size // ranks), **self._options())

    def test_dataloader(self) -> DataLoader:
        return self.val_dataloader()

    def _ranks(self) -> tuple[int, int]:
        trainer = self.trainer
        return (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)

    def _options(self) -> dict[str, Any]:
        return {
            "num_workers": self.workers,
            "persistent_workers": self.workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }


class Held:
    """Images that are in memory: tensors (n, channels, height, width) and (n,)."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images, self.labels = images, labels.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index], self.labels[index]
