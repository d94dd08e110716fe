"""The geometry of a layer: how its weight acts, and what it contributes to its factors.

A layer is, per group g, a matrix product y[n, s, g] = W[g] · r[n, s, g] of the weight matrix
with rows r made from the input (sample n, shared position s). Its factors need sums over the
rows of the input and of the output gradient; the four methods that form them are all that a
new kind of layer must supply. `RowLayer` derives them from tensor networks.

To support a new module, subclass one of the two (a frozen dataclass of hyper-parameters) and
register a function on `layer_of` that builds it from the module; `layer_named` does so for
a class of a package that may be missing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import singledispatch
from math import prod
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from tn_kfac.tensor_network.pattern import SpatialAxis
from tn_kfac.tensor_network.rows import Approx

Saved = tuple[Tensor, ...]
Reads = Literal["diagonal", "gram", "rows"]


@dataclass(frozen=True)
class Ask:
    """What is wanted of a layer.

    Attributes:
        approx: KFAC-expand or KFAC-reduce.
        weight: Whether the weight is trained.
        bias: Whether the bias is trained.
        input: What of the input's factor is read: the gram, its diagonal, or the rows.
        output: What of the output gradient's.
        dtype: Of the sums.
    """

    approx: Approx
    weight: bool = True
    bias: bool = False
    input: Reads = "gram"
    output: Reads = "gram"
    dtype: torch.dtype = torch.float32

    @property
    def input_diagonal(self) -> bool:
        """Whether the diagonal of the input's factor suffices."""
        return self.input == "diagonal"

    @property
    def output_diagonal(self) -> bool:
        """Whether that of the output gradient's does."""
        return self.output == "diagonal"


@dataclass(frozen=True)
class Cost:
    """What the statistics of one call take.

    Attributes:
        flops: Multiplications and additions.
        lowering: What computes the input's factor.
    """

    flops: int
    lowering: str


@dataclass(frozen=True)
class Layer(ABC):
    """Hyper-parameters of a layer; hashable, so that plans are cached by it.

    Attributes:
        groups: Groups, each with a weight matrix and factors of its own.
        features_in: Columns of each group's weight matrix, without a bias.
        features_out: Rows of each group's weight matrix.
        stored: Whether a contiguous weight holds its matrices by rows or by columns, if either.
        bias_is: Where the bias is appended to the weight matrix: a column or a row.
        diagonal_input: Whether the input's factor is diagonal, whatever a user asks for.
        autocast: Whether autocast runs such a layer in its lower precision.
        casts: Whether its methods take tensors of any dtype, and form sums in `Ask.dtype`.
        structured: Whether its factors may have any structure; others are dense or diagonal.
        curvature: "kronecker", or "diagonal" where the factors are the Fisher's own blocks
            of the few parameters of a channel.
    """

    bias_is: ClassVar[str] = "column"
    stored: ClassVar[Literal["rows", "columns"] | None] = None
    diagonal_input: ClassVar[bool] = False
    autocast: ClassVar[bool] = False
    casts: ClassVar[bool] = False
    structured: ClassVar[bool] = True
    curvature: ClassVar[str] = "kronecker"

    groups: int
    features_in: int
    features_out: int

    def saved(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Saved:
        """The tensors of a call that the factors need, one at least: the input.

        They are those that the module saves for its own backward pass, so that they cost no
        memory.
        """
        return (args[0] if args else kwargs["input"],)

    @abstractmethod
    def counts(self, gradient: torch.Size) -> tuple[int, int]:
        """Samples and shared positions, from the shape of the output gradient."""

    @abstractmethod
    def input_factor(self, saved: Saved, gradient: torch.Size, ask: Ask) -> Tensor:
        """Σ of outer products of input rows, (groups, in, in); the diagonal if asked for.

        KFAC-reduce averages rows over shared positions first.
        """

    @abstractmethod
    def input_total(self, saved: Saved, gradient: torch.Size, ask: Ask) -> Tensor:
        """Σ of input rows, (groups, in): the factor's column for a bias."""

    @abstractmethod
    def gradient_factor(self, saved: Saved, gradient: Tensor, ask: Ask) -> Tensor:
        """Σ of outer products of output gradients, (groups, out, out); or the diagonal.

        KFAC-reduce sums them over shared positions first.
        """

    def input_parts(self, saved: Saved, gradient: torch.Size, ask: Ask) -> Iterator[Tensor]:
        """The rows of the input, a part (groups, rows, in) at a time."""
        raise AssertionError(f"{type(self).__name__} has no rows of the input")

    def gradient_parts(self, saved: Saved, gradient: Tensor, ask: Ask) -> Iterator[Tensor]:
        """The rows of the output gradient, a part (groups, rows, out) at a time."""
        raise AssertionError(f"{type(self).__name__} has no rows of the output gradient")

    def pixels(self, saved: Saved, gradient: Tensor) -> tuple[Tensor, Tensor] | None:
        """The call as (x, v), where rows are windows of x; None where they are not.

        Shapes: x (n, c, *pixels) and v (n, d, *positions), channels in groups.
        """
        return None

    def windows(self, shape: torch.Size) -> tuple[SpatialAxis, ...]:
        """The windows along each axis of pixels of such an x; none: each pixel is a row."""
        return ()

    def thinned(
        self, saved: Saved, gradient: Tensor, start: int, every: int
    ) -> tuple[Saved, Tensor]:
        """The samples start, start + every, … of a call; all, where they depend on each other."""
        return saved, gradient

    def cost(self, shape: torch.Size, gradient: torch.Size, ask: Ask) -> Cost:
        """What statistics take, by shapes of input and output gradient; nothing is computed.

        Here: a pass over the input, and products of the rows of the output gradient.
        """
        samples, positions = self.counts(gradient)
        rows, summed = (samples * positions, 0) if ask.approx == "expand" else (samples, 1)
        products = rows * self.groups * self.features_out
        products *= 1 if ask.output_diagonal else self.features_out
        return Cost(2 * (prod(shape) + products) + summed * prod(gradient), "direct")

    def dims(self, weight: bool, bias: bool) -> tuple[int, int]:
        """Columns and rows of the joint matrix of the trained ones of weight and bias."""
        if self.bias_is == "row":
            return self.features_in, self.features_out * weight + bias
        return self.features_in * weight + bias, self.features_out

    def to_matrix(self, weight: Tensor) -> Tensor:
        """The weight (or its gradient) as matrices, (groups, features_out, features_in)."""
        return weight.reshape(self.groups, self.features_out, self.features_in)

    def from_matrix(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `to_matrix`, for a weight of the given shape."""
        return matrix.reshape(shape)

    def joined(self, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Weight and bias (or their gradients) as one matrix per group; None: not trained."""
        parts = [] if weight is None else [self.to_matrix(weight)]
        if bias is not None:
            parts.append(bias.reshape(self.groups, -1, 1))
        return self.bordered(parts)

    def bordered(self, parts: Sequence[Tensor]) -> Tensor:
        """Matrices of weights with their biases beside them, or either alone."""
        return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=self._bias_dim)

    def unbordered(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `bordered` for weights with biases: copies of either."""
        own = matrix.shape[self._bias_dim] - 1
        weights, biases = matrix.split((own, 1), dim=self._bias_dim)
        return weights.contiguous(), biases.contiguous()

    def parted(
        self, matrix: Tensor, weight: torch.Size | None, bias: torch.Size | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The inverse of `joined`, for the shapes of weight and bias."""
        own = self.features_in if self.bias_is == "column" else self.features_out
        left = None if weight is None else matrix.narrow(self._bias_dim, 0, own)
        return (
            None if left is None or weight is None else self.from_matrix(left, weight),
            None if bias is None else matrix.select(self._bias_dim, -1).reshape(bias),
        )

    @property
    def _bias_dim(self) -> int:
        return -1 if self.bias_is == "column" else -2


@dataclass(frozen=True)
class Refused:
    """Why a module has no factors, though one could think so: users are told."""

    why: str


def overrides(module: nn.Module) -> bool:
    """Whether a module computes something else than the class that its geometry is of.

    Then the geometry may be wrong: register a function for the subclass itself.
    """
    for kind in type(module).__mro__:
        if kind in layer_of.registry or _name(kind) in _BY_NAME:
            return False
        if "forward" in vars(kind):
            return True
    return False


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


Build = TypeVar("Build", bound=Callable[[Any], Layer | Refused | None])
_BY_NAME: dict[str, Callable[[Any], Layer | Refused | None]] = {}


@singledispatch
def layer_of(module: nn.Module) -> Layer | Refused | None:
    """The geometry of a module, None if it has no factors.

    Dispatches on the module's type; a subclass is treated like its base class (but one that
    `overrides` the forward pass is refused where layers are looked for).
    """
    for kind in type(module).__mro__:
        build = _BY_NAME.get(_name(kind))
        if build is not None:
            return build(module)
    return None


def layer_named(name: str) -> Callable[[Build], Build]:
    """Register a function for the class of the given qualified name, without importing it."""

    def register(build: Build) -> Build:
        _BY_NAME[name] = build
        return build

    return register
