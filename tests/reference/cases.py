"""Hypothesis strategies: layers that multiply a weight matrix with rows, and their inputs."""

from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import Tensor, nn

LOSS_AVERAGES = (None, "batch", "batch+sequence")
APPROXIMATIONS = ("expand", "reduce")
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


@dataclass
class LayerCase:
    """A float64 layer and a batch for it; `batched` is False for one example without batch.

    Attributes:
        channels: Size of the output rows of all groups together; the rest is shared.
        kwargs: For the call, besides the input.
    """

    module: nn.Module
    x: Tensor
    channels: int
    batched: bool = True
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def examples(self) -> list[Tensor]:
        """The batch as examples without batch dimension."""
        return list(self.x) if self.batched else [self.x]

    def outputs(self, x: Tensor | None = None) -> Tensor:
        """The layer's output with a batch dimension, of another input if one is given."""
        y = self.module(self.x if x is None else x, **self.kwargs)
        return y if self.batched else y[None]

    def positions(self, y: Tensor) -> int:
        """Shared positions of each example of an output with a batch dimension."""
        return y[0].numel() // self.channels

    def __repr__(self) -> str:
        return (
            f"LayerCase({self.module}, x={tuple(self.x.shape)}, batched={self.batched}, "
            f"kwargs={self.kwargs}, training={self.module.training})"
        )


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
    module = nn.Linear(draw(features), draw(features), bias=draw(st.booleans()))
    return _on_features(draw, with_values(draw, module), module.in_features, module.out_features)


@st.composite
def transposed_linear_cases(draw: DrawFn) -> LayerCase:
    """A Conv1D of HuggingFace, which is a Linear with the weight transposed."""
    from transformers.pytorch_utils import Conv1D

    outs, ins = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    return _on_features(draw, with_values(draw, Conv1D(outs, ins)), ins, outs)


def _on_features(draw: DrawFn, module: nn.Module, ins: int, outs: int) -> LayerCase:
    shared = draw(st.lists(st.integers(1, 3), max_size=3))
    batched = bool(shared) or draw(st.booleans())
    batch = [draw(st.integers(1, 4))] if batched else []
    return LayerCase(module, normal(draw, *batch, *shared, ins), outs, batched)


@st.composite
def conv_cases(draw: DrawFn, dims: int) -> LayerCase:
    """A convolution with every hyper-parameter, on an input with or without a batch."""
    module = with_values(draw, CONVOLUTIONS[dims](**_conv_options(draw, dims)))
    more = 4 if dims < 3 else 1
    sizes = [draw(st.integers(least, least + more)) for least in _least_sizes(module)]
    return _on_channels(draw, module, sizes)


@st.composite
def conv_transpose_cases(draw: DrawFn, dims: int) -> LayerCase:
    """A transposed convolution with every hyper-parameter, its output's size asked for or not."""
    stride, dilation = _per_dim(draw, dims, 1, 3), _per_dim(draw, dims, 1, 3)
    extra = [draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)]
    module = TRANSPOSED[dims](
        **_channels(draw),
        kernel_size=_per_dim(draw, dims, 1, 3 if dims < 3 else 2),
        stride=stride,
        padding=draw(st.sampled_from([_per_dim(draw, dims, 0, 2), draw(st.integers(0, 2))])),
        output_padding=tuple(extra),
        dilation=dilation,
        bias=draw(st.booleans()),
    )
    asked = draw(st.booleans())
    extents = zip(stride, module.padding, dilation, module.kernel_size, strict=True)
    sizes, outputs = [], []
    for (s, p, d, k), own in zip(extents, extra, strict=True):
        # (size − 1) s + reach + extra ≥ 1 pixels are left of the output.
        more = draw(st.integers(0, s - 1)) if asked else own
        reach = d * (k - 1) + 1 - 2 * p
        least = max(1, 1 - (reach + more - 1) // s)
        size = draw(st.integers(least, least + (2 if dims < 3 else 1)))
        sizes.append(size)
        outputs.append((size - 1) * s + reach + more)
    kwargs = {"output_size": outputs} if asked else {}
    return _on_channels(draw, with_values(draw, module), sizes, kwargs)


def _on_channels(
    draw: DrawFn, module: Any, sizes: list[int], kwargs: dict[str, Any] | None = None
) -> LayerCase:
    batched = draw(st.booleans())
    batch = [draw(st.integers(1, 3))] if batched else []
    x = normal(draw, *batch, module.in_channels, *sizes)
    return LayerCase(module, x, module.out_channels, batched, kwargs or {})


def layer_cases() -> SearchStrategy[LayerCase]:
    """Any supported layer that multiplies a weight matrix with rows."""
    return st.one_of(
        linear_cases(),
        transposed_linear_cases(),
        *(conv_cases(dims) for dims in CONVOLUTIONS),
        *(conv_transpose_cases(dims) for dims in TRANSPOSED),
    )


def normal(draw: DrawFn, *shape: int) -> Tensor:
    """Normal numbers of a drawn seed."""
    return torch.randn(shape, dtype=torch.float64, generator=_generator(draw))


def with_values(draw: DrawFn, module: nn.Module) -> nn.Module:
    """The module in float64 with parameters of a drawn seed."""
    generator = _generator(draw)
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter.normal_(generator=generator)
    return module


def _generator(draw: DrawFn) -> torch.Generator:
    return torch.Generator().manual_seed(draw(st.integers(0, 2**16)))


def _per_dim(draw: DrawFn, dims: int, low: int, high: int) -> tuple[int, ...]:
    return tuple(draw(st.integers(low, high)) for _ in range(dims))


def _channels(draw: DrawFn) -> dict[str, int]:
    """Channels of up to three groups, each with one (depthwise) or two."""
    groups = draw(st.integers(1, 3))
    per_group = st.integers(1, 2)
    ins, outs = groups * draw(per_group), groups * draw(per_group)
    return {"in_channels": ins, "out_channels": outs, "groups": groups}


def _conv_options(draw: DrawFn, dims: int) -> dict[str, Any]:
    def each(low: int, high: int) -> tuple[int, ...]:
        return _per_dim(draw, dims, low, high)

    stride = each(1, 3)
    same = ["same"] if draw(st.booleans()) else []
    if same:
        stride = (1,) * dims
    padding = same or [each(0, 2), draw(st.integers(0, 2)), "valid"]
    return {
        **_channels(draw),
        "kernel_size": each(1, 3 if dims < 3 else 2),
        "stride": draw(st.sampled_from([stride, stride[0]])),
        "padding": draw(st.sampled_from(padding)),
        "dilation": draw(st.sampled_from([each(1, 3 if dims < 3 else 2), 1])),
        "bias": draw(st.booleans()),
        "padding_mode": draw(st.sampled_from(["zeros", "circular", "reflect", "replicate"])),
    }


def _least_sizes(module: Any) -> list[int]:
    """The smallest input that the kernel fits into and that the padding mode can pad."""
    # torch's own list, last dimension first: (left, right) pixels of every dimension.
    flat = list(module._reversed_padding_repeated_twice)
    padding = [flat[i : i + 2] for i in range(0, len(flat), 2)][::-1]
    sizes = []
    for kernel, dilation, sides in zip(module.kernel_size, module.dilation, padding, strict=True):
        fits = dilation * (kernel - 1) + 1 - sum(sides)
        padable = {"reflect": max(sides) + 1, "circular": max(sides)}.get(module.padding_mode, 1)
        sizes.append(max(fits, padable, 1))
    return sizes
