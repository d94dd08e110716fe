"""Second moments of each example's gradient in a Kronecker basis: the eigenvalues of EKFAC."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from tn_kfac.layers.base import Ask, Layer, Saved
from tn_kfac.structures import Structure

LIMIT = 1 << 24
"""The most entries of gradients of single examples that are held at once."""


def second_moments(
    layer: Layer,
    ask: Ask,
    saved: Saved,
    gradient: Tensor,
    spaces: tuple[Structure, Structure],
    basis: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Σ_n (Q_Gᵀ G_n Q_A)², entry by entry, (groups, d_out, d_in [+ 1]).

    G_n is example n's gradient of weight and bias, a sum over shared positions, for
    KFAC-reduce as for KFAC-expand (https://arxiv.org/abs/1806.03884, equation 11).

    Args:
        layer: The geometry; it has rows.
        ask: What is trained, and the dtype.
        saved: What the layer saved of the call, in that dtype.
        gradient: The output gradient, in that dtype.
        spaces: Of Q_A and Q_G.
        basis: Q_A and Q_G; None: nothing is measured yet, and the moments are zeros.
    """
    columns, outs = layer.dims(ask.weight, ask.bias)
    total = gradient.new_zeros(layer.groups, outs, columns)
    if basis is None:
        return total
    ask = replace(ask, approx="expand")
    Q_A, Q_G = (Q.to(gradient.dtype) for Q in basis)
    _, positions = layer.counts(gradient.shape)
    gradients = torch.cat(list(layer.gradient_parts(saved, gradient, ask)), dim=1)
    gradients = spaces[1].apply_transposed(Q_G, gradients.mT).mT
    done = 0
    for rows in _input_rows(layer, ask, saved, gradient):
        rows = spaces[0].apply_transposed(Q_A, rows.mT).mT
        mine = gradients.narrow(1, done, rows.shape[1])
        done += rows.shape[1]
        if positions == 1:
            total += mine.square().mT @ rows.square()
            continue
        samples = max(1, LIMIT // total.numel()) * positions
        for g, a in zip(mine.split(samples, 1), rows.split(samples, 1), strict=True):
            g, a = (part.unflatten(1, (-1, positions)) for part in (g, a))
            total += (g.mT @ a).square().sum(1)
    return total


def _input_rows(layer: Layer, ask: Ask, saved: Saved, gradient: Tensor) -> Iterator[Tensor]:
    """Rows that multiply the trained ones of weight and bias, (groups, rows, in [+ 1])."""
    if not ask.weight:
        samples, positions = layer.counts(gradient.shape)
        yield gradient.new_ones(layer.groups, samples * positions, 1)
        return
    for rows in layer.input_parts(saved, gradient.shape, ask):
        yield pad(rows, (0, 1), value=1.0) if ask.bias else rows
