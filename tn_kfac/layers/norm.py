"""The affine parameters of normalisation layers: the exact Fisher of each channel.

y[n, s, c] = scale[c] · z[n, s, c] + shift[c] with z the normalised input. The gradient of
example n for a channel is (Σ_s z g, Σ_s g), and the Fisher's block of the channel the sum of
its outer products: the factor G of a layer with one group per channel, whose A is 1. With
diagonal structures it is the diagonal of the Fisher. (Batch statistics count as constants.)
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from tn_kfac.layers.base import Ask, Cost, Layer, Saved, layer_of


@dataclass(frozen=True)
class NormLayer(Layer):
    """A normalisation whose affine parameters have the shape `channels`."""

    bias_is: ClassVar[str] = "row"
    structured: ClassVar[bool] = False
    curvature: ClassVar[str] = "diagonal"

    channels: tuple[int, ...]
    eps: float

    @abstractmethod
    def normalised(self, saved: Saved) -> Tensor:
        """z, of the input's shape."""

    @abstractmethod
    def per_example(self, values: Tensor) -> Tensor:
        """Values of the output's shape summed over shared positions, (n, groups)."""

    def input_factor(self, saved: Saved, gradient: torch.Size, ask: Ask) -> Tensor:
        samples, positions = self.counts(gradient)
        rows = samples * positions if ask.approx == "expand" else samples
        shape = (self.groups, 1) if ask.input_diagonal else (self.groups, 1, 1)
        return torch.full(shape, float(rows), dtype=ask.dtype, device=saved[0].device)

    def input_total(self, saved: Saved, gradient: torch.Size, ask: Ask) -> Tensor:
        raise AssertionError("the bias is a row")

    def gradient_factor(self, saved: Saved, gradient: Tensor, ask: Ask) -> Tensor:
        parts = [self.per_example(gradient * self.normalised(saved))] if ask.weight else []
        parts += [self.per_example(gradient)] if ask.bias else []
        rows = torch.stack(parts, dim=-1)  # (n, groups, parameters)
        if ask.output_diagonal:
            return rows.square().sum(0)
        return torch.einsum("ngi,ngj->gij", rows, rows)

    def cost(self, shape: torch.Size, gradient: torch.Size, ask: Ask) -> Cost:
        """Normalised input (5 an element), product and sum (2), sum for the bias (1)."""
        parameters = ask.weight + ask.bias
        products = parameters if ask.output_diagonal else parameters**2
        passes = prod(gradient) * (7 * ask.weight + ask.bias)
        return Cost(passes + 2 * self.counts(gradient)[0] * self.groups * products, "direct")


@dataclass(frozen=True)
class LayerNormLayer(NormLayer):
    """LayerNorm, or RMSNorm (`centred` is False): channels are the last dimensions."""

    centred: bool

    def counts(self, gradient: torch.Size) -> tuple[int, int]:
        samples, *shared = gradient[: len(gradient) - len(self.channels)] or (1,)
        return samples, prod(shared)

    def normalised(self, saved: Saved) -> Tensor:
        if self.centred:
            return F.layer_norm(saved[0], self.channels, eps=self.eps)
        return F.rms_norm(saved[0], self.channels, eps=self.eps)

    def per_example(self, values: Tensor) -> Tensor:
        return values.reshape(*self.counts(values.shape), self.groups).sum(1)


@dataclass(frozen=True)
class GroupNormLayer(NormLayer):
    """GroupNorm: channels are dimension 1."""

    normalised_groups: int

    def counts(self, gradient: torch.Size) -> tuple[int, int]:
        return gradient[0], prod(gradient[2:])

    def normalised(self, saved: Saved) -> Tensor:
        return F.group_norm(saved[0], self.normalised_groups, eps=self.eps)

    def per_example(self, values: Tensor) -> Tensor:
        return values.flatten(2).sum(2) if values.dim() > 2 else values


@dataclass(frozen=True)
class BatchNormLayer(NormLayer):
    """BatchNorm. Saved are the input and, where these are used, the running statistics."""

    def saved(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Saved:
        inputs = super().saved(module, args, kwargs)
        assert isinstance(module, _BatchNorm)
        if module.training or module.running_mean is None or module.running_var is None:
            return inputs
        return (*inputs, module.running_mean.clone(), module.running_var.clone())

    def counts(self, gradient: torch.Size) -> tuple[int, int]:
        return gradient[0], prod(gradient[2:])

    def normalised(self, saved: Saved) -> Tensor:
        x, *statistics = saved
        mean, variance = statistics or (None, None)
        return F.batch_norm(x, mean, variance, training=not statistics, eps=self.eps)

    def per_example(self, values: Tensor) -> Tensor:
        return values.flatten(2).sum(2) if values.dim() > 2 else values


def _affine(module: nn.Module) -> tuple[int, ...] | None:
    weight = getattr(module, "weight", None)
    return None if weight is None else tuple(weight.shape)


@layer_of.register(nn.LayerNorm)
@layer_of.register(nn.RMSNorm)
def _(module: nn.LayerNorm | nn.RMSNorm) -> Layer | None:
    channels = _affine(module)
    if channels is None:
        return None
    centred, eps = isinstance(module, nn.LayerNorm), module.eps
    if eps is None:  # that of the module's dtype, not of the statistics'
        eps = torch.finfo(module.weight.dtype).eps
    return LayerNormLayer(prod(channels), 1, 1, channels, eps, centred)


@layer_of.register
def _(module: nn.GroupNorm) -> Layer | None:
    channels = _affine(module)
    if channels is None:
        return None
    return GroupNormLayer(prod(channels), 1, 1, channels, module.eps, module.num_groups)


@layer_of.register
def _(module: _BatchNorm) -> Layer | None:
    channels = _affine(module)
    return None if channels is None else BatchNormLayer(prod(channels), 1, 1, channels, module.eps)


@layer_of.register
def _(module: nn.SyncBatchNorm) -> None:
    """It normalises with statistics of other processes, which are not at hand."""
    return None
