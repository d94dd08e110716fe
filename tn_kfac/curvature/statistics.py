"""What a layer contributes to its Kronecker factors in one backward pass.

With rows a (of the input, a one appended for a bias) and g (of the output gradient),

    expand: A = Σ_{n,s} a aᵀ, G = Σ_{n,s} g gᵀ    reduce: the same with a averaged and
                                                  g summed over the shared positions s

(https://arxiv.org/abs/2311.00636). Both are plain sums, as are the counts that
normalise them, so sums over micro-batches of any sizes equal those of one batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Literal

import torch
from torch import Tensor, nn

from tn_kfac.curvature.factors import Factors, Measured
from tn_kfac.curvature.moments import second_moments
from tn_kfac.kernels.window_gram import runs_on, window_gram
from tn_kfac.layers.base import Ask, Layer, Saved
from tn_kfac.structures import Dense, Diagonal, Spec, Structure
from tn_kfac.tensor_network.rows import Approx

Basis = tuple[Tensor, Tensor] | None
Fisher = Literal["empirical", "mc", "type-2", "forward-only"]
LossAverage = Literal["batch", "batch+sequence"] | None


@dataclass(frozen=True)
class Recipe:
    """Which statistics of a layer to form: its geometry and the choices of the user.

    Attributes:
        layer: The geometry.
        has_weight: Whether the weight is trained.
        has_bias: Whether the bias is trained.
        approx: KFAC-expand or KFAC-reduce.
        loss_average: What the loss averages over; of no effect for a Fisher whose gradients
            are not those of the loss.
        structures: Of the input's and the output gradient's factor, as the user chose them.
        fisher: What the gradients are (`fisher` says more).
        every: Of how many samples one is measured.
        moments: Whether to measure second moments in a basis too (EKFAC); of layers with rows.
    """

    layer: Layer
    has_weight: bool
    has_bias: bool
    approx: Approx
    loss_average: LossAverage
    structures: tuple[Spec, Spec]
    fisher: Fisher = "empirical"
    every: int = 1
    moments: bool = False

    @cached_property
    def input_structure(self) -> Structure:
        """The structure of A: what the user chose, unless the layer's is diagonal anyway."""
        return self._chosen(self.structures[0], self.dim_in, self.layer.diagonal_input)

    @cached_property
    def output_structure(self) -> Structure:
        """The structure of G."""
        return self._chosen(self.structures[1], self.dim_out, False)

    def _chosen(self, spec: Spec, dim: int, diagonal: bool) -> Structure:
        space = Diagonal() if diagonal else spec.for_dim(dim)
        return Dense() if space.reads == "rows" and not self.layer.structured else space

    @cached_property
    def dim_in(self) -> int:
        """Dimension of A."""
        return self.layer.dims(self.has_weight, self.has_bias)[0]

    @cached_property
    def dim_out(self) -> int:
        """Dimension of G."""
        return self.layer.dims(self.has_weight, self.has_bias)[1]

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the statistics: A, G, the counts (rows, loss terms), moments if any."""
        groups = self.layer.groups
        input_shape = self.input_structure.coordinate_shape(self.dim_in)
        output_shape = self.output_structure.coordinate_shape(self.dim_out)
        shapes = ((groups, *input_shape), (groups, *output_shape), (2,))
        return (*shapes, (groups, self.dim_out, self.dim_in)) if self.moments else shapes

    @cached_property
    def packed(self) -> bool:
        """Whether the statistics are one vector: where all of them are small."""
        spaces = (self.input_structure, self.output_structure)
        return not self.moments and all(space.reads == "diagonal" for space in spaces)

    def probe_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes in which statistics leave the backward pass."""
        shapes = self.shapes()
        return ((sum(map(prod, shapes)),),) if self.packed else shapes

    def pack(self, parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The statistics in these shapes."""
        return (torch.cat([part.flatten() for part in parts]),) if self.packed else tuple(parts)

    def unpack(self, held: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The inverse of `pack`: A, G, counts, moments if any."""
        if not self.packed:
            return tuple(held)
        shapes = self.shapes()
        parts = held[0].split([prod(shape) for shape in shapes])
        return tuple(part.view(shape) for part, shape in zip(parts, shapes, strict=True))

    def terms(self, gradient: torch.Size, first_use: bool) -> int:
        """The loss terms that a call with an output gradient of this shape counts."""
        samples, positions = self.layer.counts(gradient)
        if not first_use or self.fisher != "empirical":
            return 0
        return samples * positions if self.loss_average == "batch+sequence" else samples

    def thinned(self, saved: Saved, gradient: Tensor, turn: int) -> tuple[Saved, Tensor, float]:
        """The samples of a call that are measured, and how many times as many there are."""
        if self.every == 1:
            return saved, gradient, 1.0
        samples, _ = self.layer.counts(gradient.shape)
        if samples:
            start = turn % min(self.every, samples)
            saved, gradient = self.layer.thinned(saved, gradient, start, self.every)
        measured, _ = self.layer.counts(gradient.shape)
        return saved, gradient, samples / measured if measured < samples else 1.0

    def normalise(self, A: Tensor, G: Tensor, counts: Tensor, basis: Basis = None) -> Factors:
        """Factors from summed statistics: A over its rows, G by the terms of the loss.

        `basis` is what `statistics` was given. Counts may be those of several layers, (layers, 2):
        one for each group.
        """
        A = A / _over(counts[..., 0].clamp(min=1), A)  # an empty batch has no rows
        if self.fisher == "forward-only":
            return Factors(A, _identity(self.output_structure, basis and basis[1], self.dim_out, G))
        return Factors(A, self.per_term(G, counts))

    def per_term(self, total: Tensor, counts: Tensor) -> Tensor:
        """A sum of products of gradients, by the terms of the loss.

        This is the one place where a mean loss is accounted for: its gradients carry
        1/N each, so their outer products carry 1/N² and their sum wants a factor N. Gradients
        of another Fisher carry no such factor: their sum is divided by what the loss is.
        """
        terms = _over(counts[..., 1], total)
        if self.fisher != "empirical":
            return total / torch.where(terms > 0, terms, torch.ones_like(terms))
        return total if self.loss_average is None else total * terms

    def measured(self, parts: Sequence[Tensor], basis: Basis = None) -> Measured:
        """The factors, and second moments if there are any, from all summed statistics."""
        A, G, counts, *moments = parts
        factors = self.normalise(A, G, counts, basis)
        return Measured(factors, self.per_term(moments[0], counts) if moments else None)

    def ask(self, dtype: torch.dtype) -> Ask:
        """What the layer is asked for."""
        return Ask(
            self.approx,
            self.has_weight,
            self.has_bias,
            self.input_structure.reads,
            self.output_structure.reads,
            dtype,
        )


def statistics(
    recipe: Recipe,
    saved: Saved,
    gradient: Tensor,
    dtype: torch.dtype,
    first_use: bool = True,
    with_input: bool = True,
    basis: Basis = None,
    turn: int = 0,
) -> tuple[Tensor, ...]:
    """(A, G, counts, moments if any) of one call of a layer, unnormalised, in `dtype`.

    Args:
        recipe: What to form.
        saved: What the layer saved of the call; nothing if only its bias is trained.
        gradient: The gradient of the loss with respect to the layer's output.
        dtype: Of the statistics, and of the sums in them.
        first_use: Whether this is the layer's first call in a forward pass of the model;
            later calls add rows, but no samples.
        with_input: Whether to form A; without, its rows are none.
        basis: K and C of structures that read rows: A is Π(Kᵀ A K) for them, G Π(Cᵀ G C).
            Without, they are identities. For moments, the basis that these are taken in.
        turn: Which sample of each `recipe.every` is measured.
    """
    layer, ask = recipe.layer, recipe.ask(dtype)
    terms = recipe.terms(gradient.shape, first_use)
    saved, gradient, share = recipe.thinned(saved, gradient, turn)
    measured, positions = layer.counts(gradient.shape)
    if recipe.moments or not layer.casts:
        gradient = gradient.to(dtype)
        saved = tuple(t.to(dtype) if t.is_floating_point() else t for t in saved)
    rows = measured * positions if recipe.approx == "expand" else measured
    counts = gradient.new_full((2,), rows * with_input, dtype=dtype)
    counts[1].fill_(terms)
    K, C = (None, None) if basis is None or recipe.moments else basis
    if recipe.fisher == "forward-only":
        G = counts.new_zeros(recipe.shapes()[1])
    elif ask.output == "rows":
        G = _projected(recipe.output_structure, layer.gradient_parts(saved, gradient, ask), C)
    else:
        G = layer.gradient_factor(saved, gradient, ask)
    G = G * share if share != 1.0 else G
    more: tuple[Tensor, ...] = ()
    if recipe.moments:
        spaces = (recipe.input_structure, recipe.output_structure)
        found = second_moments(layer, ask, saved, gradient, spaces, basis)
        more = (found * share if share != 1.0 else found,)
    if not with_input:
        return counts.new_zeros(recipe.shapes()[0]), G, counts, *more
    return _input_statistic(recipe, saved, gradient, rows, ask, K), G, counts, *more


def _projected(space: Structure, parts: Iterable[Tensor], K: Tensor | None) -> Tensor:
    """Π(Kᵀ R K) with R the gram of all rows, (groups, *coordinates)."""
    total = None
    for rows in parts:
        if K is not None:
            rows = space.apply_transposed(K.to(rows.dtype), rows.mT).mT
        part = space.project_gram(rows)
        total = part if total is None else total + part
    assert total is not None
    return total


def _over(numbers: Tensor, like: Tensor) -> Tensor:
    """One number, or one for each group, to be combined with (groups, …)."""
    return numbers.reshape(-1, *(1 for _ in like.shape[1:]))


def _identity(space: Structure, K: Tensor | None, dim: int, like: Tensor) -> Tensor:
    """The statistic of H = I, one for each group of `like`."""
    if K is not None and space.reads == "rows":
        return space.gram(K.to(like.dtype))
    return space.eye(len(like), dim, like.dtype, like.device)


def _input_statistic(
    recipe: Recipe, saved: Saved, gradient: Tensor, rows: int, ask: Ask, K: Tensor | None
) -> Tensor:
    """The statistic A: the factor of the rows, bordered by their sum for a bias."""
    layer, space = recipe.layer, recipe.input_structure
    column_of_ones = recipe.has_bias and layer.bias_is == "column"
    if not saved:
        like = gradient.new_empty(layer.groups, dtype=ask.dtype)
        return _identity(space, K, recipe.dim_in, like) * rows
    if ask.input == "rows":
        parts = layer.input_parts(saved, gradient.shape, ask)
        if column_of_ones:
            parts = (nn.functional.pad(part, (0, 1), value=1.0) for part in parts)
        return _projected(space, parts, K)
    A = _input_factor(layer, saved, gradient, ask)
    if not column_of_ones:
        return A
    corner = gradient.new_full((layer.groups,), rows, dtype=ask.dtype)
    column = None if ask.input_diagonal else layer.input_total(saved, gradient.shape, ask)
    return space.border(A, column, corner)


def _input_factor(layer: Layer, saved: Saved, gradient: Tensor, ask: Ask) -> Tensor:
    """The factor of the rows: of half-precision windows by one kernel, where it runs."""
    wanted = ask.approx == "expand" and not ask.input_diagonal and ask.dtype == torch.float32
    if wanted and runs_on(saved[0]):
        pixels = layer.pixels(saved, gradient)
        if pixels is not None:
            found = window_gram(pixels[0], layer.windows(pixels[0].shape), layer.groups)
            if found is not None:
                return found
    return layer.input_factor(saved, gradient.shape, ask)
