"""Convolutions with all hyper-parameters: one exact pair of factors per channel group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod

import torch
from torch import Tensor, nn

from tn_kfac.layers.base import Layer, Saved, layer_of
from tn_kfac.layers.rows import RowLayer
from tn_kfac.tensor_network.convolution import Convolution, Padding, convolution
from tn_kfac.tensor_network.pattern import SpatialAxis
from tn_kfac.tensor_network.rows import Rows, channel_rows


@dataclass(frozen=True)
class ConvLayer(RowLayer):
    """A convolution. Rows of the input are its unfolded patches, per group."""

    stored = "rows"

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: Padding
    dilation: tuple[int, ...]
    padding_mode: str

    def prepare_input(self, x: Tensor) -> Tensor:
        x = self.prepare_gradient(x)
        if self.padding_mode == "zeros":
            return x
        return nn.functional.pad(x, self._pad_widths(x.shape), mode=self.padding_mode)

    def prepare_gradient(self, gradient: Tensor) -> Tensor:
        return gradient if gradient.dim() > len(self.kernel_size) + 1 else gradient[None]

    def _pad_widths(self, shape: torch.Size) -> list[int]:
        """The widths that `nn.functional.pad` takes: last dimension first."""
        dims = self._convolution(shape, self.padding).spatial
        return list(chain.from_iterable(axis.padding for axis in reversed(dims)))

    def _convolution(self, shape: Sequence[int], padding: Padding) -> Convolution:
        arguments = (self.stride, padding, self.dilation, self.groups)
        return convolution(tuple(shape), self.kernel_size, *arguments)

    def input_rows(self, shape: torch.Size, output: torch.Size) -> Rows:
        padding = self.padding if self.padding_mode == "zeros" else 0
        return self._convolution(shape, padding).rows()

    def pixels(self, saved: Saved, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return self.prepare_input(saved[0]), self.prepare_gradient(gradient)

    def windows(self, shape: torch.Size) -> tuple[SpatialAxis, ...]:
        padding = self.padding if self.padding_mode == "zeros" else 0
        return self._convolution(shape, padding).spatial

    def gradient_rows(self, shape: torch.Size) -> Rows:
        batch, _, *spatial = shape
        return channel_rows("v", batch, self.groups, self.features_out, spatial)


@layer_of.register(nn.Conv1d)
@layer_of.register(nn.Conv2d)
@layer_of.register(nn.Conv3d)
def _(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Layer:
    return ConvLayer(
        groups=module.groups,
        features_in=module.in_channels // module.groups * prod(module.kernel_size),
        features_out=module.out_channels // module.groups,
        kernel_size=module.kernel_size,
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
        padding_mode=module.padding_mode,
    )
