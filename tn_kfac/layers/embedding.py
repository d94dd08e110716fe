"""Embeddings: rows are one-hot, so their factor is a diagonal of counts.

A look-up adds rows e[index] with weights: KFAC-expand has a row for each look-up, whose
factor is diag(counts); the rows of a sample that KFAC-reduce averages, and those of a bag,
have several entries, of which the diagonal is kept:

    diag(Σ_r a_r a_rᵀ)[v] = Σ_r (Σ_{look-ups e of v in r} weight_e)²

The weight is kept as (embeddings, features) by torch, the matrix here is its transpose.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tn_kfac.layers.base import Ask, Layer, Refused, Saved, layer_of


@dataclass(frozen=True)
class LookUpLayer(Layer):
    """A layer of one-hot rows.

    Attributes:
        padding_index: The index that is not trained, −1 if there is none.
    """

    diagonal_input: ClassVar[bool] = True
    padding_index: int

    @abstractmethod
    def look_ups(self, saved: Saved, ask: Ask) -> tuple[Tensor, Tensor | None, Tensor | float]:
        """Indices, the row that each is for (None: each its own), and its weight."""

    def input_factor(self, saved: Saved, gradient: torch.Size, ask: Ask) -> Tensor:
        indices, rows, weights = self.look_ups(saved, ask)
        each = (indices != self.padding_index).to(ask.dtype) * weights
        squares = each * (each if rows is None else _sums(rows * self.features_in + indices, each))
        total = squares.new_zeros(self.features_in).index_add_(0, indices, squares)
        return total[None]

    def input_total(self, saved: Saved, gradient: torch.Size, ask: Ask) -> Tensor:
        raise AssertionError("an embedding has no bias")

    def gradient_factor(self, saved: Saved, gradient: Tensor, ask: Ask) -> Tensor:
        (rows,) = self.gradient_parts(saved, gradient, ask)
        return rows.square().sum(1) if ask.output_diagonal else rows.mT @ rows

    def gradient_parts(self, saved: Saved, gradient: Tensor, ask: Ask) -> Iterator[Tensor]:
        rows = gradient.reshape(*self.counts(gradient.shape), self.features_out)
        yield (rows.flatten(0, 1) if ask.approx == "expand" else rows.sum(1))[None]

    def to_matrix(self, weight: Tensor) -> Tensor:
        return weight.mT[None]

    def from_matrix(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        return matrix[0].mT


def _sums(keys: Tensor, values: Tensor) -> Tensor:
    """For each entry the sum of the values of all entries with its key."""
    ordered, order = keys.sort()
    run = torch.cat([ordered.new_zeros(1), (ordered[1:] != ordered[:-1]).long()]).cumsum(0)
    run = run[: len(keys)]
    totals = torch.zeros_like(values).index_add_(0, run, values[order])
    return torch.empty_like(values).index_copy_(0, order, totals[run])


@dataclass(frozen=True)
class EmbeddingLayer(LookUpLayer):
    """A look-up for each index; dimensions after the first are shared."""

    def counts(self, gradient: torch.Size) -> tuple[int, int]:
        samples, *shared = gradient[:-1] or (1,)
        return samples, prod(shared)

    def thinned(
        self, saved: Saved, gradient: Tensor, start: int, every: int
    ) -> tuple[Saved, Tensor]:
        if not saved[0].dim():
            return saved, gradient
        return (saved[0][start::every],), gradient[start::every]

    def look_ups(self, saved: Saved, ask: Ask) -> tuple[Tensor, Tensor | None, Tensor | float]:
        indices = saved[0] if saved[0].dim() else saved[0][None]
        if ask.approx == "expand" or indices.dim() == 1:
            return indices.flatten().long(), None, 1.0
        samples = torch.arange(len(indices), device=indices.device)
        flat = indices.flatten(1).long()
        rows = samples[:, None].expand_as(flat).flatten()
        return flat.flatten(), rows, 1.0 / max(1, flat.shape[1])


@dataclass(frozen=True)
class EmbeddingBagLayer(LookUpLayer):
    """Weighted sums (or means) of look-ups: each bag is a row, and a sample.

    Saved are indices, offsets (empty: bags are the rows of the indices) and weights (empty:
    all one).
    """

    mean: bool
    last_offset: bool

    def saved(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Saved:
        names = ("input", "offsets", "per_sample_weights")
        given = dict(zip(names, args, strict=False)) | dict(kwargs)
        indices, offsets, weights = (given.get(name) for name in names)
        assert indices is not None
        return (
            indices,
            indices.new_empty(0) if offsets is None else offsets,
            indices.new_empty(0, dtype=torch.float32) if weights is None else weights.detach(),
        )

    def counts(self, gradient: torch.Size) -> tuple[int, int]:
        return gradient[0], 1

    def look_ups(self, saved: Saved, ask: Ask) -> tuple[Tensor, Tensor | None, Tensor | float]:
        indices, offsets, weights = saved
        place = torch.arange(indices.numel(), device=indices.device)
        counted = (indices.flatten() != self.padding_index).to(ask.dtype)
        if indices.dim() == 2:
            rows = place // max(1, indices.shape[1])
        else:
            starts = offsets[:-1] if self.last_offset else offsets
            rows = torch.searchsorted(starts.contiguous(), place, right=True) - 1
            if self.last_offset:  # what comes after it is in no bag
                counted = counted * (place < offsets[-1])
        indices = indices.flatten().long()
        if not self.mean:
            return indices, rows, counted * weights.flatten() if weights.numel() else counted
        return indices, rows, counted / _sums(rows, counted).clamp(min=1.0)


@layer_of.register
def _(module: nn.Embedding) -> Layer | Refused:
    if module.sparse or module.scale_grad_by_freq:
        return Refused("has sparse gradients, or scales them by frequency")
    padding = -1 if module.padding_idx is None else module.padding_idx
    return EmbeddingLayer(1, module.num_embeddings, module.embedding_dim, padding)


@layer_of.register
def _(module: nn.EmbeddingBag) -> Layer | Refused:
    if module.sparse or module.scale_grad_by_freq or module.mode == "max":
        return Refused("has sparse gradients, scales them by frequency, or takes a maximum")
    padding = -1 if module.padding_idx is None else module.padding_idx
    sizes = (1, module.num_embeddings, module.embedding_dim, padding)
    return EmbeddingBagLayer(*sizes, module.mode == "mean", module.include_last_offset)
