"""A loader that goes on where it stopped, on any number of ranks and workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from training.seeds import mix, seeded

At = tuple[int, int]  # epoch, index


class Seeded(Dataset):
    """Images by (epoch, index), whose random transforms depend on these and the seed alone."""

    def __init__(self, images: Any, seed: int) -> None:
        self.images, self.seed = images, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, at: At) -> tuple[Tensor, int]:
        with seeded(self.seed, *at):
            return self.images[at[1]]

    def __getitems__(self, ats: list[At]) -> list[tuple[Tensor, int]]:
        """A batch, as torch's DataLoader asks for it; where that is faster than one by one."""
        return [self[at] for at in ats]


Order = Callable[[torch.Generator], Tensor]


class Batches(Sampler[list[At]]):
    """One epoch's worth of batches from `start()` on, this rank's share of each.

    Batch p of all training is batch p mod n of epoch p // n, which is a permutation by
    `order`, drawn from (seed, epoch); its last images that fill no batch are left out.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int,
        rank: int,
        ranks: int,
        start: Callable[[], int],
        order: Order,
    ) -> None:
        self.order = order
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.rank, self.ranks, self.start = rank, ranks, start

    def __len__(self) -> int:
        return self.count // self.batch_size

    def __iter__(self) -> Iterator[list[At]]:
        first, drawn, order = self.start(), -1, torch.empty(0)
        for position in range(first, first + len(self)):
            epoch, batch = divmod(position, len(self))
            if epoch != drawn:
                generator = torch.Generator().manual_seed(mix(self.seed, epoch))
                drawn, order = epoch, self.order(generator)
            whole = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield [(epoch, index) for index in whole[self.rank :: self.ranks].tolist()]


class Loader(DataLoader):
    """Training batches in an order given by the seed; its state is the number handed out.

    Args:
        images: What to draw from.
        batch_size: Images a step, over all ranks: a run may go on with another number of ranks.
        rank: This process, of `ranks`.
        ranks: Number of processes.
        order: A permutation of all indices, drawn with a generator.
        options: Of torch's DataLoader.

    Raises:
        ValueError: If a batch cannot be filled, or not be shared out evenly.
    """

    def __init__(
        self,
        images: Seeded,
        batch_size: int,
        rank: int = 0,
        ranks: int = 1,
        *,
        order: Order,
        **options: Any,
    ) -> None:
        if batch_size > len(images):
            raise ValueError(
                f"data.batch_size: {batch_size} is more than the {len(images)} training images; "
                "take a smaller one"
            )
        if batch_size % ranks:
            raise ValueError(
                f"data.batch_size: {batch_size} (over all ranks) cannot be shared by {ranks} "
                "ranks; take a multiple of that"
            )
        # (plain integers: jsonargparse has types of its own, that a checkpoint must not hold)
        self.handed_out, self.images_a_step = 0, int(batch_size)
        batches = Batches(
            len(images), batch_size, images.seed, rank, ranks, lambda: self.handed_out, order
        )
        super().__init__(images, batch_sampler=batches, **options)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for batch in super().__iter__():
            self.handed_out += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Batches handed out so far, and their size."""
        return {"batches": self.handed_out, "batch_size": self.images_a_step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after those batches.

        Raises:
            ValueError: If they had another size.
        """
        if state["batch_size"] != self.images_a_step:
            raise ValueError(
                f"data.batch_size: {self.images_a_step}, but the checkpoint was written with "
                f"{state['batch_size']}; resume with that"
            )
        self.handed_out = state["batches"]


class Share(Dataset):
    """Every `ranks`-th image from `rank` on, each once and seeded, to evaluate on."""

    def __init__(self, images: Seeded, rank: int, ranks: int) -> None:
        self.images = images
        self.indices = range(rank, len(images), ranks)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, at: int) -> tuple[Tensor, int]:
        return self.images[0, self.indices[at]]

    def __getitems__(self, ats: list[int]) -> list[tuple[Tensor, int]]:
        return self.images.__getitems__([(0, self.indices[at]) for at in ats])
