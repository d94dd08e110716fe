"""Hypothesis strategies: layers with all hyper-parameters, and inputs that fit them."""

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import Tensor, nn

LOSS_AVERAGES = (None, "batch", "batch+sequence")
APPROXIMATIONS = ("expand", "reduce")


@dataclass
class LayerCase:
    """A float64 layer and a batch for it; `batched` is False for one example without batch."""

    module: nn.Module
    x: Tensor
    batched: bool = True

    @property
    def examples(self) -> list[Tensor]:
        """The batch as examples without batch dimension."""
        return list(self.x) if self.batched else [self.x]

    def __repr__(self) -> str:
        return f"LayerCase({self.module}, x={tuple(self.x.shape)}, batched={self.batched})"


def example_loss(y: Tensor, n: int) -> Tensor:
    """A loss without symmetries for the output y (no batch dimension) of example n."""
    phase = torch.arange(y.numel(), dtype=y.dtype).view_as(y)
    return (torch.cos(phase + n) * y + 0.1 * torch.sin(2 * phase - n) * y**2).sum()


def batch_loss(y: Tensor, terms: int = 1, first: int = 0) -> Tensor:
    """(1 / terms) Σ_n of the losses of the examples of a batch, numbered from `first`."""
    return torch.stack([example_loss(y_n, first + n) for n, y_n in enumerate(y)]).sum() / terms


@st.composite
def linear_cases(draw: DrawFn) -> LayerCase:
    """A Linear between (batch, any shared dimensions, features), or 1-d features."""
    features = st.integers(1, 4)
    module = nn.Linear(draw(features), draw(features), bias=draw(st.booleans())).double()
    shared = draw(st.lists(st.integers(1, 3), max_size=3))
    batched = bool(shared) or draw(st.booleans())
    batch = [draw(st.integers(1, 4))] if batched else []
    return LayerCase(module, _normal(draw, *batch, *shared, module.in_features), batched)


@st.composite
def conv2d_cases(draw: DrawFn) -> LayerCase:
    """A Conv2d with every hyper-parameter, on an input with or without a batch."""
    options = _conv_options(draw)
    module = nn.Conv2d(**options).double()
    sizes = [draw(st.integers(least, least + 4)) for least in _least_sizes(module)]
    batched = draw(st.booleans())
    batch = [draw(st.integers(1, 3))] if batched else []
    return LayerCase(module, _normal(draw, *batch, options["in_channels"], *sizes), batched)


def layer_cases() -> SearchStrategy[LayerCase]:
    """Any supported layer."""
    return st.one_of(linear_cases(), conv2d_cases())


def _normal(draw: DrawFn, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def _conv_options(draw: DrawFn) -> dict[str, Any]:
    def pair(low: int, high: int) -> tuple[int, int]:
        return draw(st.integers(low, high)), draw(st.integers(low, high))

    groups = draw(st.integers(1, 3))
    ins, outs = pair(1, 2)
    stride = pair(1, 3)
    same = ["same"] if draw(st.booleans()) else []
    if same:
        stride = (1, 1)
    return {
        "in_channels": groups * ins,
        "out_channels": groups * outs,
        "kernel_size": pair(1, 3),
        "stride": draw(st.sampled_from([stride, stride[0]])),
        "padding": draw(st.sampled_from(same or [pair(0, 2), draw(st.integers(0, 2)), "valid"])),
        "dilation": draw(st.sampled_from([pair(1, 3), 1])),
        "groups": groups,
        "bias": draw(st.booleans()),
        "padding_mode": draw(st.sampled_from(["zeros", "circular", "reflect", "replicate"])),
    }


def _least_sizes(module: nn.Conv2d) -> list[int]:
    """The smallest input that the kernel fits into and that the padding mode can pad."""
    # torch's own list, last dimension first: (left, right) pixels of every dimension.
    flat = list(module._reversed_padding_repeated_twice)
    padding = [flat[2:], flat[:2]]
    sizes = []
    for kernel, dilation, sides in zip(module.kernel_size, module.dilation, padding, strict=True):
        fits = dilation * (kernel - 1) + 1 - sum(sides)
        padable = {"reflect": max(sides) + 1, "circular": max(sides)}.get(module.padding_mode, 1)
        sizes.append(max(fits, padable, 1))
    return sizes
