"""The tap in a compiled model: one opaque operator in the backward graph.

The compiler traces the identity and its backward pass, but not what a layer's statistics are
made of: networks and plans are Python objects. So the backward pass is a custom operator
that knows the tap by a number, and all its tensors are explicit; no graph breaks.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor


class Measures(Protocol):
    """What the operator needs of a tap."""

    recording: bool

    def forget_discarded(self) -> None:
        """Drop statistics whose gradients were dropped."""
        ...

    def measure(
        self, saved: tuple[Tensor, ...], gradient: Tensor, first_use: bool
    ) -> tuple[Tensor, ...]:
        """The statistics of one call."""
        ...


_taps: WeakValueDictionary[int, Measures] = WeakValueDictionary()
_keys = itertools.count()


def register(tap: Measures) -> int:
    """A number for a tap, by which compiled graphs know it as long as it lives."""
    key = next(_keys)
    _taps[key] = tap
    return key


_library = torch.library.Library("tn_kfac", "FRAGMENT")
_library.define(
    "statistics(int key, bool first, Tensor gradient, Tensor[] saved, SymInt[] sizes, "
    "ScalarType dtype) -> Tensor[]",
    tags=torch.Tag.flexible_layout,  # whatever strides the compiler likes
)


def statistics(
    key: int,
    first: bool,
    gradient: Tensor,
    saved: Sequence[Tensor],
    sizes: Sequence[int],
    dtype: torch.dtype,
) -> list[Tensor]:
    """The statistics of one call of a layer, flat; zeros, where none are wanted.

    All that decides what the result looks like is an argument: compiled graphs are cached on
    disk, and another process has another tap under the same key. (`torch.library.custom_op` would
    do the same at more than twice the host's time for a call.)
    """
    tap = _taps[key]
    if not tap.recording:
        return _like(gradient, sizes, dtype)
    tap.forget_discarded()
    return [part.contiguous().view(-1) for part in tap.measure(tuple(saved), gradient, first)]


_library.impl("statistics", statistics, "CompositeExplicitAutograd")


@torch.library.register_fake("tn_kfac::statistics", lib=_library)
def _(
    key: int,
    first: bool,
    gradient: Tensor,
    saved: Sequence[Tensor],
    sizes: Sequence[int],
    dtype: torch.dtype,
) -> list[Tensor]:
    return _like(gradient, sizes, dtype)


def _like(gradient: Tensor, sizes: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    """Zeros of the sizes of the probes."""
    return [gradient.new_zeros(size, dtype=dtype) for size in sizes]


class TracedTap(torch.autograd.Function):
    """Identity on a layer's output, whose backward hands statistics to the probes."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, key: int, first: bool, count: int,
                *tensors: Tensor) -> Tensor:  # fmt: skip
        """Return a copy of `output`, which the compiler fuses away; save `count` tensors."""
        ctx.save_for_backward(*tensors[:count])
        ctx.key, ctx.first = key, first
        ctx.shapes, ctx.dtype = [probe.shape for probe in tensors[count:]], tensors[-1].dtype
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Pass the gradient on unchanged, and give each probe its statistic."""
        (gradient,) = gradients
        saved = ctx.saved_tensors
        sizes = [shape.numel() for shape in ctx.shapes]
        flat = torch.ops.tn_kfac.statistics(
            ctx.key, ctx.first, gradient, list(saved), sizes, ctx.dtype
        )
        parts = (part.view(shape) for part, shape in zip(flat, ctx.shapes, strict=True))
        return gradient, None, None, None, *(None for _ in saved), *parts


def traced_tap(
    output: Tensor, key: int, first: bool, saved: tuple[Tensor, ...], probes: tuple[Tensor, ...]
) -> Tensor:
    """The output passed through the tap of the given key."""
    return TracedTap.apply(output, key, first, len(saved), *saved, *probes)


def forget_compiled() -> None:
    """Have models compiled again, now that hooks came or went.

    By default Dynamo does not guard on a module's hooks: a graph without a tap would be used
    for a model that has taps (also for another model of the same class). From now on it does.
    """
    if "torch._dynamo" in sys.modules:
        dynamo = sys.modules["torch._dynamo"]
        dynamo.config.skip_nnmodule_hook_guards = False
        dynamo.reset()
