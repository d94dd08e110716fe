"""The geometry of a layer: how its weight acts on rows, and how rows come from tensors.

A layer is, per channel group g, a matrix product y[n, s, g] = W[g] · r[n, s, g] of the
weight matrix with rows r made from the input. Curvature needs only the networks of the
input's rows and of the output gradient's rows.

To support a new module, subclass `Layer` (a frozen dataclass of hyper-parameters) and
register a function on `layer_of` that builds it from the module.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import singledispatch

import torch
from torch import Tensor, nn

from tn_kfac.tensor_network.rows import Rows


@dataclass(frozen=True)
class Layer(ABC):
    """Hyper-parameters of a layer; hashable, so that plans are cached by it.

    Attributes:
        groups: Channel groups, each with a weight matrix and factors of its own.
        features_in: Columns of each group's weight matrix, without a bias.
        features_out: Rows of each group's weight matrix.
    """

    groups: int
    features_in: int
    features_out: int

    @abstractmethod
    def prepare_input(self, x: Tensor) -> Tensor:
        """The input with a batch dimension, and with padding that is not zeros."""

    @abstractmethod
    def prepare_gradient(self, gradient: Tensor) -> Tensor:
        """The output gradient with a batch dimension."""

    @abstractmethod
    def input_rows(self, shape: torch.Size) -> Rows:
        """Rows of a prepared input of the given shape, from operand `x`."""

    @abstractmethod
    def gradient_rows(self, shape: torch.Size) -> Rows:
        """Rows of a prepared output gradient of the given shape, from operand `v`."""

    def to_matrix(self, weight: Tensor) -> Tensor:
        """The weight (or its gradient) as matrices, (groups, features_out, features_in)."""
        return weight.reshape(self.groups, self.features_out, self.features_in)

    def from_matrix(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `to_matrix`, for a weight of the given shape."""
        return matrix.reshape(shape)


@singledispatch
def layer_of(module: nn.Module) -> Layer | None:
    """The geometry of a module, None if it has no Kronecker factors.

    Dispatches on the module's type; a subclass is treated like its base class.
    """
    return None
