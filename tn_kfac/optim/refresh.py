"""New inverses (or eigenbases) of many layers' factors, from averages to the layers' states.

What cannot be decomposed leaves its channel group as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tn_kfac.optim.damping import Damping, Mode, from_basis, shifts
from tn_kfac.optim.inverses import Inverse, Request, eigen, inverses
from tn_kfac.optim.notice import Notice
from tn_kfac.structures import Structure

SIDES = ("A", "G")
State = dict[str, Any]


class Layer(NamedTuple):
    """A layer whose averages A and G are in its state."""

    name: str
    state: State
    spaces: tuple[Structure, Structure]
    dims: tuple[int, int]

    def average(self, side: int) -> Tensor:
        """The debiased moving average of a factor, (groups, *coordinates)."""
        weight = self.state["weight"]
        average = self.state[SIDES[side]]
        return average / weight.clamp(min=torch.finfo(weight.dtype).tiny).to(average.dtype)

    def mean(self, side: int) -> Tensor:
        """Its mean eigenvalue, (groups)."""
        return self.spaces[side].trace(self.average(side)) / self.dims[side]


class How(NamedTuple):
    """How factors are damped and inverted; iterations are those of Newton-Schulz."""

    inverse: Inverse
    mode: Mode
    exponent: float
    iterations: int = 0


def refresh(due: Sequence[tuple[Layer, Damping, How]], notice: Notice) -> None:
    """Decompose the factors of all layers; those that are treated alike in the same calls."""
    together: dict[How, list[tuple[Layer, Damping]]] = {}
    for layer, damping, how in due:
        together.setdefault(how, []).append((layer, damping))
    for how, pairs in together.items():
        layers, dampings = zip(*pairs, strict=True)
        if how.inverse == "eigh":
            refresh_eigenbases(layers, notice)
        else:
            refresh_inverses(layers, dampings, how, notice)


def new_state(
    layer: Layer, inverse: Inverse, dtypes: tuple[torch.dtype, torch.dtype], device: torch.device
) -> State:
    """What a layer's state holds for an inverse until there is one: that of identities."""
    groups, state = layer.state["A"].shape[0], {}
    for side, space, dim, dtype in zip(SIDES, layer.spaces, layer.dims, dtypes, strict=True):
        eye = space.eye(groups, dim, dtype, device)
        if inverse == "eigh":
            state[f"{side}_values"] = torch.ones(groups, dim, dtype=dtype, device=device)
            state[f"{side}_basis"] = eye
        else:
            state[f"{side}_inverse"] = eye
    return state


def refresh_eigenbases(layers: Sequence[Layer], notice: Notice) -> None:
    """Decompose all factors."""
    requests = [
        Request(layer.spaces[side], (layer.average(side),)) for layer in layers for side in (0, 1)
    ]
    found = eigen(requests)
    fits = [
        torch.isfinite(values).all(-1) & torch.isfinite(request.space.largest(basis))
        for request, (values, basis) in zip(requests, found, strict=True)
    ]
    fitting = iter(notice.watch(_names(layers), fits))
    results = iter(found)
    for layer in layers:
        state, overlaps = layer.state, []
        for side, space in zip(SIDES, layer.spaces, strict=True):
            (values, basis), fits_now = next(results), next(fitting) & (state["weight"] > 0)
            old = state[f"{side}_basis"].clone()
            _replace(state[f"{side}_values"], values, fits_now)
            _replace(state[f"{side}_basis"], basis, fits_now)
            if "moments" in state:
                overlaps.append(_squared_overlap(space, state[f"{side}_basis"], old))
        if overlaps:
            state["moments"].copy_(from_basis(state["moments"], layer.spaces, tuple(overlaps)))


def _names(layers: Sequence[Layer]) -> list[str]:
    return [f"{side} of {layer.name!r}" for layer in layers for side in SIDES]


def _squared_overlap(space: Structure, new: Tensor, old: Tensor) -> Tensor:
    """(newᵀ old)², entry by entry: it takes a diagonal in the old basis to that in the new.

    The diagonal of Rᵀ diag(s) R, R = oldᵀ new, is Σ_j (newᵀ old)²_ij s_j: exact, positive, of the
    same sum, and whatever the order and the signs of the new eigenvectors.
    """
    pairs = zip(space.blocks(new), space.blocks(old), strict=True)
    return space.from_blocks([(left.mT @ right).square() for left, right in pairs])


def refresh_inverses(
    layers: Sequence[Layer], dampings: Sequence[Damping], how: How, notice: Notice
) -> None:
    """Invert all damped factors."""
    requests = []
    for layer, damping in zip(layers, dampings, strict=True):
        added = shifts(how.mode, damping, (layer.mean(0), layer.mean(1)))
        for side, shift in enumerate(added):
            space, average = layer.spaces[side], layer.average(side)
            eye = space.eye(len(average), layer.dims[side], average.dtype, average.device)
            damped = average + space.scale(eye, shift * torch.ones_like(layer.mean(side)))
            last = layer.state[f"{SIDES[side]}_inverse"]
            requests.append(
                Request(space, (damped,) if how.inverse == "cholesky" else (damped, last))
            )
    found = inverses(requests, how.inverse, how.exponent, how.iterations)
    fits = [
        torch.isfinite(request.space.largest(inverse))
        for request, inverse in zip(requests, found, strict=True)
    ]
    results = zip(found, notice.watch(_names(layers), fits), strict=True)
    for layer in layers:
        for side in SIDES:
            inverse, fits_now = next(results)
            _replace(
                layer.state[f"{side}_inverse"], inverse, fits_now & (layer.state["weight"] > 0)
            )


def isotropic(layer: Layer, damping: Damping, how: How) -> None:
    """As if both factors were multiples of I: for layers whose turn has not come yet."""
    state = layer.state
    means = (layer.mean(0), layer.mean(1))
    added = (0.0, 0.0) if how.mode == "exact" else shifts(how.mode, damping, means)
    sides = zip(SIDES, layer.spaces, layer.dims, means, added, strict=True)
    for side, space, dim, mean, shift in sides:
        if f"{side}_values" in state:
            values = mean[:, None].expand_as(state[f"{side}_values"])
            _replace(state[f"{side}_values"], values, torch.isfinite(mean))
            continue
        multiple = (mean + shift).reciprocal() ** how.exponent
        eye = space.eye(len(mean), dim, mean.dtype, mean.device)
        fits = torch.isfinite(multiple)
        _replace(state[f"{side}_inverse"], space.scale(eye, multiple), fits)


def _replace(old: Tensor, new: Tensor, fits: Tensor) -> None:
    """Write `new` over `old` for the channel groups where it fits."""
    fits = fits.reshape(-1, *(1 for _ in new.shape[1:]))
    old.copy_(torch.where(fits, new.to(old.dtype), old))
