"""Transposed convolutions: one exact pair of factors per channel group."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from tn_kfac.layers.base import Layer, layer_of
from tn_kfac.layers.rows import RowLayer
from tn_kfac.tensor_network.convolution import transposed_convolution
from tn_kfac.tensor_network.rows import Rows, channel_rows


@dataclass(frozen=True)
class ConvTransposeLayer(RowLayer):
    """A transposed convolution, with a weight (in channels, out channels / groups, *kernel).

    Rows of the input hold, for each pixel of the output, the inputs that reach it.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    def prepare_input(self, x: Tensor) -> Tensor:
        return x if x.dim() > len(self.kernel_size) + 1 else x[None]

    def prepare_gradient(self, gradient: Tensor) -> Tensor:
        return self.prepare_input(gradient)

    def input_rows(self, shape: torch.Size, output: torch.Size) -> Rows:
        """The output's size says how much output padding there was, in this very call."""
        sizes = zip(
            shape[2:], output[2:], self.kernel_size, self.stride, self.padding, self.dilation,
            strict=True,
        )  # fmt: skip
        extra = [n - (m - 1) * s + 2 * p - d * (k - 1) - 1 for m, n, k, s, p, d in sizes]
        geometry = (self.kernel_size, self.stride, self.padding, extra, self.dilation)
        return transposed_convolution(tuple(shape), *geometry, self.groups).rows()

    def gradient_rows(self, shape: torch.Size) -> Rows:
        batch, _, *spatial = shape
        return channel_rows("v", batch, self.groups, self.features_out, spatial)

    def to_matrix(self, weight: Tensor) -> Tensor:
        """(in, out / groups, *k) as (groups, out / groups, in / groups · K)."""
        return weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(2)

    def from_matrix(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        channels = shape[0] // self.groups
        split = matrix.reshape(self.groups, self.features_out, channels, *shape[2:])
        return split.transpose(1, 2).reshape(shape)


@layer_of.register(nn.ConvTranspose1d)
@layer_of.register(nn.ConvTranspose2d)
@layer_of.register(nn.ConvTranspose3d)
def _(module: nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d) -> Layer:
    assert not isinstance(module.padding, str)
    return ConvTransposeLayer(
        groups=module.groups,
        features_in=module.in_channels // module.groups * prod(module.kernel_size),
        features_out=module.out_channels // module.groups,
        kernel_size=module.kernel_size,
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
    )
