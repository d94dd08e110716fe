"""What a layer contributes to its Kronecker factors in one backward pass.

With rows a (of the input, a one appended for a bias) and g (of the output gradient),

    expand: A = Σ_{n,s} a aᵀ, G = Σ_{n,s} g gᵀ    reduce: the same with a averaged and
                                                  g summed over the shared positions s

(https://arxiv.org/abs/2311.00636). Both are plain sums, as are the counts that
normalise them, so sums over micro-batches of any sizes equal those of one batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tn_kfac.layers.base import Layer
from tn_kfac.structures import Structure
from tn_kfac.tensor_network.execute import execute
from tn_kfac.tensor_network.rows import Approx
from tn_kfac.tensor_network.slicing import AnyPlan, plan

LossAverage = Literal["batch", "batch+sequence"] | None


class Factors(NamedTuple):
    """Normalised factors of a layer in the coordinates of their structures.

    A: mean of the outer products of input rows, (groups, *coordinates).
    G: sum of the outer products of output gradients, times the number of terms that
       the loss averages over: the sum, over a batch of losses ℓ_n with mean loss, is
       (1/N) Σ_n ∂ℓ_n ∂ℓ_nᵀ. Shape (groups, *coordinates).
    """

    A: Tensor
    G: Tensor


@dataclass(frozen=True)
class Recipe:
    """Which statistics of a layer to form: its geometry and the choices of the user."""

    layer: Layer
    has_weight: bool
    has_bias: bool
    approx: Approx
    loss_average: LossAverage
    input_structure: Structure
    output_structure: Structure

    @property
    def dim_in(self) -> int:
        """Dimension of A: features, and one for a bias."""
        return self.layer.features_in * self.has_weight + self.has_bias

    @property
    def dim_out(self) -> int:
        """Dimension of G."""
        return self.layer.features_out

    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Shapes of the statistics: A, G, and the counts (rows, loss terms)."""
        groups = self.layer.groups
        input_shape = self.input_structure.coordinate_shape(self.dim_in)
        output_shape = self.output_structure.coordinate_shape(self.dim_out)
        return (groups, *input_shape), (groups, *output_shape), (2,)

    def normalise(self, A: Tensor, G: Tensor, counts: Tensor) -> Factors:
        """Factors from summed statistics: A over its rows, G times the loss terms.

        This is the one place where a mean loss is accounted for: its gradients carry
        1/N each, so their outer products carry 1/N² and their sum wants a factor N.
        """
        rows, terms = counts.unbind()
        rows = rows.clamp(min=1)  # an empty batch has no rows
        return Factors(A / rows, G if self.loss_average is None else G * terms)


@dataclass(frozen=True)
class _Plans:
    """Plans for one pair of input and gradient shapes, and the counts that go with them."""

    input_factor: AnyPlan | None
    input_total: AnyPlan | None
    gradient_factor: AnyPlan
    rows: int
    terms: int


@lru_cache(maxsize=4096)
def _plans(recipe: Recipe, input_shape: torch.Size | None, gradient_shape: torch.Size) -> _Plans:
    approx = recipe.approx
    gradients = recipe.layer.gradient_rows(gradient_shape)
    factor = total = None
    if input_shape is not None:
        inputs = recipe.layer.input_rows(input_shape)
        diagonal = recipe.input_structure.diagonal_suffices
        tied = inputs.feature if diagonal else ()
        factor = plan(inputs.factor(approx, mean=True, tied=tied))
        if recipe.has_bias and not diagonal:
            total = plan(inputs.total(approx, mean=True))
    tied = gradients.feature if recipe.output_structure.diagonal_suffices else ()
    every = gradients.samples * gradients.positions
    return _Plans(
        input_factor=factor,
        input_total=total,
        gradient_factor=plan(gradients.factor(approx, tied=tied)),
        rows=every if approx == "expand" else gradients.samples,
        terms=every if recipe.loss_average == "batch+sequence" else gradients.samples,
    )


def statistics(
    recipe: Recipe, x: Tensor | None, gradient: Tensor, dtype: torch.dtype, first_use: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """(A, G, counts) of one call of a layer, unnormalised, in `dtype`.

    Args:
        recipe: What to form.
        x: The layer's input; None if only its bias is trained.
        gradient: The gradient of the loss with respect to the layer's output.
        dtype: Of the statistics; both tensors are cast to it.
        first_use: Whether this is the layer's first call in a forward pass of the model;
            later calls add rows, but no samples.
    """
    gradient = recipe.layer.prepare_gradient(gradient.to(dtype))
    if x is not None:
        x = recipe.layer.prepare_input(x.to(dtype))
    plans = _plans(recipe, None if x is None else x.shape, gradient.shape)
    G = execute(plans.gradient_factor, {"v": gradient})
    counts = gradient.new_full((2,), plans.rows)
    counts[1] = plans.terms * first_use
    return _input_statistic(recipe, plans, x, gradient), G, counts


def _input_statistic(recipe: Recipe, plans: _Plans, x: Tensor | None, like: Tensor) -> Tensor:
    """The statistic A: the factor of the rows, bordered by their sum for a bias."""
    corner = like.new_full((recipe.layer.groups,), plans.rows)
    if x is None or plans.input_factor is None:
        return recipe.input_structure.eye(len(corner), 1, like.dtype, like.device) * plans.rows
    A = execute(plans.input_factor, {"x": x})
    if not recipe.has_bias:
        return A
    column = execute(plans.input_total, {"x": x}) if plans.input_total else None
    return recipe.input_structure.border(A, column, corner)
