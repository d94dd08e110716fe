"""Randomness as a function of position: nothing to save, nothing to restore."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def mix(*position: int) -> int:
    """A seed of 63 bits for a position, as (seed, epoch, image); all are non-negative."""
    return int(np.random.SeedSequence(position).generate_state(1, np.uint64)[0]) >> 1


@contextmanager
def seeded(*position: int) -> Iterator[None]:
    """Let torch's CPU generator start from `position`, and put it back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(mix(*position))
        yield
