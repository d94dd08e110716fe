"""Curvature of several processes: sums over all ranks, in a few messages.

Data-parallel ranks see other samples of one batch. Statistics are plain sums, so the curvature of
the whole batch is that of the summed statistics; gradients are the wrapper's to average
(`torch.nn.parallel.DistributedDataParallel`, say).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, distributed

from tn_kfac.curvature import LayerTap

MESSAGE = 2**25
"""Bytes of statistics in one message, about as many as DistributedDataParallel has of gradients."""
Group = Any  # None, False, or a distributed.ProcessGroup, where torch is built with it


def ranks_of(group: Group) -> int:
    """How many processes share the curvature: one, if `group` is False or there is no group."""
    if group is False or not distributed.is_available() or not distributed.is_initialized():
        return 1
    return distributed.get_world_size(group)


def rank_in(group: Group) -> int:
    """This process's number among those that share the curvature."""
    return distributed.get_rank(group) if ranks_of(group) > 1 else 0


def check_group(name: str, value: object) -> None:
    """None (all processes), False (none), or a process group.

    Raises:
        TypeError: If it is none of them.
    """
    known = (distributed.ProcessGroup,) if distributed.is_available() else ()
    if value is not None and value is not False and not isinstance(value, known):
        raise TypeError(
            f"{name} must be None (all processes), False (each on its own) or a "
            f"torch.distributed.ProcessGroup, got {value!r}"
        )


REDUCE_DTYPES = (torch.bfloat16, torch.float32, torch.float64)


def check_reduce_dtype(name: str, value: object) -> None:
    """None, or a dtype whose range is that of curvature.

    Raises:
        ValueError: If its range is too small.
        TypeError: If it is no such dtype.
    """
    if value is torch.float16:
        raise ValueError(
            f"{name}={value} has too small a range for sums of curvature: choose torch.bfloat16"
        )
    if value is not None and value not in REDUCE_DTYPES:
        raise TypeError(f"{name} must be None or one of {list(REDUCE_DTYPES)}, got {value!r}")


COUNTS = 2
"""The place of the counts in a tap's statistics (A, G, counts, moments if any)."""
Statistics = tuple[LayerTap, dict[int, Tensor]]
"""A tap, and some of its statistics by their places."""


class _Message:
    """Statistics of some taps that are being summed."""

    def __init__(
        self, entries: Sequence[Statistics], dtype: torch.dtype | None, group: Group
    ) -> None:
        parts = [part for _, statistics in entries for part in statistics.values()]
        flat = torch.cat([part.reshape(-1) for part in parts])
        self._dtype, self._flat = flat.dtype, flat.to(dtype or flat.dtype)
        self._shapes = [
            (tap, place, part.shape)
            for tap, statistics in entries
            for place, part in statistics.items()
        ]
        self._work = distributed.all_reduce(self._flat, group=group, async_op=True)

    def wait(self) -> None:
        """Wait until the sums are there."""
        if self._work is not None:
            self._work.wait()
            self._work = None

    @cached_property
    def totals(self) -> dict[LayerTap, dict[int, Tensor]]:
        """The sums, when they are there, in the dtype of what was sent."""
        self.wait()
        found: dict[LayerTap, dict[int, Tensor]] = defaultdict(dict)
        parts = self._flat.to(self._dtype).split([shape.numel() for *_, shape in self._shapes])
        for (tap, place, shape), part in zip(self._shapes, parts, strict=True):
            found[tap][place] = part.view(shape)
        return found


class Sums:
    """Sums of statistics over the ranks of a group, while they are on their way.

    A message has the statistics of some layers, at most `most` bytes if it can. All of them are
    sent at once, and each is waited for when its first layer is asked for, so that factors of the
    first layers are updated while the statistics of the others are still being summed.

    Statistics are sent and summed in `dtype`, None being their own, but for counts that it would
    round: those of all layers are the first message then, in their own dtype.
    """

    def __init__(self, most: int = MESSAGE, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype
        self._most = most
        self._on_way: dict[LayerTap, list[_Message]] = {}

    def begin(self, taps: Iterable[LayerTap], group: Group) -> None:
        """Begin to sum the statistics of all taps; nobody may read them until they arrive.

        Every rank must call it with the same taps; a rank that measured nothing adds nothing.
        """
        taps = list(taps)
        self._on_way = {tap: [] for tap in taps}
        counts = ((t, {COUNTS: _held(t)[COUNTS]}) for t in taps if counts_apart(t, self.dtype))
        others = ((tap, _sent(tap, self.dtype)) for tap in taps)
        for statistics, dtype in ((counts, None), (others, self.dtype)):
            for entries in _messages(statistics, self._most, dtype):
                message = _Message(entries, dtype, group)
                for tap, _ in entries:
                    self._on_way[tap].append(message)

    def arrive(self, tap: LayerTap) -> None:
        """Have the sums of all ranks as a tap's statistics; what no rank measured is NaN."""
        sums: dict[int, Tensor] = {}
        for message in self._on_way.pop(tap, ()):
            sums |= message.totals[tap]
        if sums:
            _unweighted(tap, [sums[place] for place in sorted(sums)])

    def end(self) -> None:
        """Wait for what nobody asked for: the statistics of layers whose owners are others."""
        for messages in self._on_way.values():
            for message in messages:
                message.wait()
        self._on_way.clear()


def counts_apart(tap: LayerTap, dtype: torch.dtype | None) -> bool:
    """Whether a tap's counts travel for themselves: where messages in `dtype` would round them."""
    return dtype is not None and torch.promote_types(dtype, tap.dtype) != dtype


def _messages(
    statistics: Iterable[Statistics], most: int, dtype: torch.dtype | None
) -> Iterator[list[Statistics]]:
    """Taps with statistics, by the message that they travel in."""
    waiting: dict[tuple[torch.dtype, torch.device], list[Statistics]] = {}
    sizes: dict[tuple[torch.dtype, torch.device], int] = defaultdict(int)
    for tap, sums in statistics:
        some = next(iter(sums.values()))
        kind = some.dtype, some.device
        size = sum(part.numel() for part in sums.values()) * (dtype or some.dtype).itemsize
        if kind in waiting and sizes[kind] + size > most:
            yield waiting.pop(kind)
            sizes[kind] = 0
        waiting.setdefault(kind, []).append((tap, sums))
        sizes[kind] += size
    yield from waiting.values()


def from_owners(parts: Sequence[tuple[int | None, Tensor]], group: Group) -> list[Tensor]:
    """Each tensor as its owner has it: one message from each, for each dtype and device.

    Every rank must call it with the same owners and shapes; what a rank holds of another one's is
    not read. Its own tensors, and those whose owner is None, are returned as they are.
    """
    rank = rank_in(group)
    messages: dict[tuple[int, torch.dtype, torch.device], list[int]] = defaultdict(list)
    for at, (owner, tensor) in enumerate(parts):
        if owner is not None:
            messages[owner, tensor.dtype, tensor.device].append(at)
    held = [tensor for _, tensor in parts]
    sent = []
    for (owner, *_), places in messages.items():
        sizes = [held[at].numel() for at in places]
        if owner == rank:
            flat = torch.cat([held[at].reshape(-1) for at in places])
        else:
            flat = held[places[0]].new_empty(sum(sizes))
        source = owner if group is None else distributed.get_global_rank(group, owner)
        work = distributed.broadcast(flat, source, group, async_op=True)
        sent.append((() if owner == rank else places, sizes, flat, work))
    for places, sizes, flat, work in sent:
        if work is not None:
            work.wait()
        for at, part in zip(places, flat.split(sizes) if places else (), strict=True):
            held[at] = part.view(held[at].shape)
    return held


def _held(tap: LayerTap) -> list[Tensor]:
    """A tap's statistics; zeros, where nothing was measured."""
    held = [torch.zeros_like(p) if p.grad is None else p.grad for p in tap.probes]
    return list(tap.recipe.unpack(held))


def _sent(tap: LayerTap, dtype: torch.dtype | None) -> dict[int, Tensor]:
    """What of a tap's statistics is sent in `dtype`, weighted; a tap without any has them now."""
    sums = _weighted(tap)
    if not tap.has_statistics:
        tap.replace(sums)
    apart = counts_apart(tap, dtype)
    return {place: part for place, part in enumerate(sums) if place != COUNTS or not apart}


def _weighted(tap: LayerTap) -> list[Tensor]:
    """A tap's statistics such that they may be added: those of a mean loss times its terms².

    Gradients of a mean carry 1/terms, which differs between ranks with batches of other sizes.
    """
    sums = _held(tap)
    if _is_mean(tap):
        A, G, counts, *moments = sums
        sums = [A, G * counts[1] ** 2, counts, *(m * counts[1] ** 2 for m in moments)]
    return sums


def _unweighted(tap: LayerTap, sums: list[Tensor]) -> None:
    """Store the sums of all ranks, as if one process had measured them."""
    A, G, counts, *moments = sums
    if _is_mean(tap):
        terms = counts[1].clamp(min=1.0) ** 2
        G, moments = G / terms, [m / terms for m in moments]
    A = torch.where(counts[0] + counts[1] > 0, A, torch.nan)
    tap.replace([A, G, counts, *moments])


def _is_mean(tap: LayerTap) -> bool:
    return tap.recipe.fisher == "empirical" and tap.recipe.loss_average is not None
