"""Curvature of several processes: sums over all ranks, in a few messages.

Data-parallel ranks see other samples of one batch. Statistics are plain sums, so the curvature of
the whole batch is that of the summed statistics; gradients are the wrapper's to average
(`torch.nn.parallel.DistributedDataParallel`, say).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

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


Statistics = tuple[LayerTap, list[Tensor]]


class _Message(NamedTuple):
    """Statistics of some taps that are being summed, and what to wait for."""

    entries: list[Statistics]
    work: Any


class Sums:
    """Sums of statistics over the ranks of a group, while they are on their way.

    A message has the statistics of some layers, at most `most` bytes if it can. All of them are
    sent at once, and each is waited for when its first layer is asked for, so that factors of the
    first layers are updated while the statistics of the others are still being summed.
    """

    def __init__(self, most: int = MESSAGE) -> None:
        self._most = most
        self._on_way: dict[LayerTap, _Message] = {}

    def begin(self, taps: Iterable[LayerTap], group: Group) -> None:
        """Begin to sum the statistics of all taps; nobody may read them until they arrive.

        Every rank must call it with the same taps; a rank that measured nothing adds nothing.
        """
        self._on_way.clear()
        for entries in _messages(taps, self._most):
            flat = torch.cat([part.reshape(-1) for _, sums in entries for part in sums])
            work = distributed.all_reduce(flat, group=group, async_op=True)
            parts = iter(flat.split([part.numel() for _, sums in entries for part in sums]))
            totals = [(tap, [next(parts).view(s.shape) for s in sums]) for tap, sums in entries]
            self._on_way |= dict.fromkeys([tap for tap, _ in entries], _Message(totals, work))

    def arrive(self, tap: LayerTap) -> None:
        """Have the sums of all ranks as a tap's statistics; what no rank measured is NaN."""
        message = self._on_way.get(tap)
        if message is None:
            return
        message.work.wait()
        for other, sums in message.entries:
            _unweighted(other, sums)
            del self._on_way[other]

    def end(self) -> None:
        """Wait for what nobody asked for: the statistics of layers whose owners are others."""
        for message in {id(message): message for message in self._on_way.values()}.values():
            message.work.wait()
        self._on_way.clear()


def _messages(taps: Iterable[LayerTap], most: int) -> Iterator[list[Statistics]]:
    """Taps with their weighted statistics, by the message that they travel in."""
    waiting: dict[tuple[torch.dtype, torch.device], list[Statistics]] = {}
    sizes: dict[tuple[torch.dtype, torch.device], int] = defaultdict(int)
    for tap in taps:
        sums = _weighted(tap)
        if not tap.has_statistics:
            tap.replace(sums)
        kind = sums[0].dtype, sums[0].device
        size = sum(part.numel() * part.element_size() for part in sums)
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


def _weighted(tap: LayerTap) -> list[Tensor]:
    """A tap's statistics such that they may be added: those of a mean loss times its terms².

    Gradients of a mean carry 1/terms, which differs between ranks with batches of other sizes.
    """
    held = [torch.zeros_like(p) if p.grad is None else p.grad for p in tap.probes]
    sums = list(tap.recipe.unpack(held))
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
