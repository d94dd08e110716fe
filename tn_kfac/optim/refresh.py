"""New inverses (or eigenbases) of many layers' factors, from averages to the layers' states.

What cannot be decomposed leaves its channel group as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tn_kfac.optim.damping import Damping, Mode, from_basis, shifts
from tn_kfac.optim.inverses import EIGEN, Inverse, Request, eigen, inverses
from tn_kfac.optim.notice import Notice
from tn_kfac.structures import Structure

SIDES = ("A", "G")
State = dict[str, Any]


class Layer(NamedTuple):
    """A layer, or several that are alike, whose averages A and G are in the state."""

    names: tuple[str, ...]
    """Of each of its layers; of one, or as many as there are channel groups."""
    state: State
    spaces: tuple[Structure, Structure]
    dims: tuple[int, int]
    group: int = 0
    """Which of all param groups, by its identity."""

    def average(self, side: int) -> Tensor:
        """The debiased moving average of a factor, (groups, *coordinates)."""
        weight = self.state["weight"]
        average = self.state[SIDES[side]]
        weight = weight.clamp(min=torch.finfo(weight.dtype).tiny).to(average.dtype)
        return average / weight.reshape(-1, *(1 for _ in average.shape[1:]))

    def mean(self, side: int) -> Tensor:
        """Its mean eigenvalue, (groups)."""
        return self.spaces[side].trace(self.average(side)) / self.dims[side]


class How(NamedTuple):
    """How factors are damped and inverted.

    Iterations are those of Newton-Schulz; of "qr" they only tell whether all is new.
    """

    inverse: Inverse
    mode: Mode
    exponent: float
    iterations: int = 0

    @property
    def inversion(self) -> tuple[Inverse, float, int]:
        """What `inverses` takes."""
        return self.inverse, self.exponent, self.iterations


class Task(NamedTuple):
    """Factors that are decomposed in the same calls, as they are now."""

    how: How
    layers: tuple[Layer, ...]
    requests: list[Request]
    """Of A and G of each layer. "newton-schulz" and "qr" read the last inverses and eigenvectors in
    the states; what else is here is a copy of theirs."""
    fits: list[Tensor]
    """Whether a layer's averages hold anything, (1)."""


Found = list[tuple[tuple[Tensor, ...], Tensor]]
"""For each request its values and basis, or its inverse, and where these are finite, (groups)."""


def tasks(due: Sequence[tuple[Layer, Damping, How]]) -> list[Task]:
    """What is to be decomposed; layers that are treated alike together."""
    together: dict[How, list[tuple[Layer, Damping]]] = {}
    for layer, damping, how in due:
        together.setdefault(how, []).append((layer, damping))
    found = []
    for how, pairs in together.items():
        layers, dampings = zip(*pairs, strict=True)
        eigen = how.inverse in EIGEN
        requests = _averages(layers, how) if eigen else _damped(layers, dampings, how)
        fits = [layer.state["weight"] > 0 for layer in layers]
        found.append(Task(how, layers, requests, fits))
    return found


def decompose(requests: Sequence[Request], how: How) -> Found:
    """Decompose all factors; states are neither read nor changed."""
    if how.inverse in EIGEN:
        parts: list[tuple[Tensor, ...]] = list(eigen(requests, how.iterations))
    else:
        parts = [(inverse,) for inverse in inverses(requests, *how.inversion)]
    return [(part, finite(part)) for part in parts]


def finite(part: Sequence[Tensor]) -> Tensor:
    """For which channel groups all tensors are finite."""
    largest = [torch.linalg.vector_norm(tensor.flatten(1), torch.inf, dim=1) for tensor in part]
    return (torch.stack(largest) < torch.inf).all(0)


def hand_out(
    task: Task, found: Found, notice: Notice, take: Callable[[Layer, State], object]
) -> None:
    """Let `take` have each layer's new tensors: where they do not fit, the old ones."""
    owners = [(side, layer.names) for layer in task.layers for side in SIDES]
    names = [
        [f"{side} of {name!r}" for name in (own * len(fits) if len(own) == 1 else own)]
        for (side, own), (_, fits) in zip(owners, found, strict=True)
    ]
    fitting = iter(notice.watch(names, [fits for _, fits in found]))
    parts = iter(part for part, _ in found)
    for layer, filled in zip(task.layers, task.fits, strict=True):
        new = {}
        for side in SIDES:
            fits = next(fitting) & filled
            for key, tensor in zip(keys_of(layer.state, side), next(parts), strict=True):
                new[key] = _where(fits, tensor, layer.state[key])
        take(layer, new)


def adopt(layer: Layer, new: Mapping[str, Tensor]) -> None:
    """Use a layer's new tensors from now on."""
    state = layer.state
    if "moments" in state:
        overlaps = [
            _squared_overlap(space, new[f"{side}_basis"], state[f"{side}_basis"])
            for side, space in zip(SIDES, layer.spaces, strict=True)
        ]
        moments = from_basis(state["moments"], layer.spaces, (overlaps[0], overlaps[1]))
        state["moments"].copy_(moments)
    for key, tensor in new.items():
        state[key].copy_(tensor)


def inverse_keys(state: State) -> list[str]:
    """Under which names a layer's state has its inverse."""
    return [key for side in SIDES for key in keys_of(state, side)]


def keys_of(state: State, side: str) -> tuple[str, ...]:
    """Those of one factor: of its eigenvalues and its basis, or of its inverse."""
    eigen = f"{side}_basis" in state
    return (f"{side}_values", f"{side}_basis") if eigen else (f"{side}_inverse",)


def new_state(
    layer: Layer, inverse: Inverse, dtypes: tuple[torch.dtype, torch.dtype], device: torch.device
) -> State:
    """What a layer's state holds for an inverse until there is one: that of identities."""
    groups, state = layer.state["A"].shape[0], {}
    for side, space, dim, dtype in zip(SIDES, layer.spaces, layer.dims, dtypes, strict=True):
        eye = space.eye(groups, dim, dtype, device)
        if inverse in EIGEN:
            state[f"{side}_values"] = torch.ones(groups, dim, dtype=dtype, device=device)
            state[f"{side}_basis"] = eye
        else:
            state[f"{side}_inverse"] = eye
    return state


def _squared_overlap(space: Structure, new: Tensor, old: Tensor) -> Tensor:
    """(newᵀ old)², entry by entry: it takes a diagonal in the old basis to that in the new.

    The diagonal of Rᵀ diag(s) R, R = oldᵀ new, is Σ_j (newᵀ old)²_ij s_j: exact, positive, of the
    same sum, and whatever the order and the signs of the new eigenvectors.
    """
    pairs = zip(space.blocks(new), space.blocks(old), strict=True)
    return space.from_blocks([(left.mT @ right).square() for left, right in pairs])


def _averages(layers: Sequence[Layer], how: How) -> list[Request]:
    """The factors, and the last eigenvectors where these are improved."""
    requests = []
    for layer in layers:
        for side, space in enumerate(layer.spaces):
            last = () if how.inverse == "eigh" else (layer.state[f"{SIDES[side]}_basis"],)
            requests.append(Request(space, (layer.average(side), *last)))
    return requests


def _damped(layers: Sequence[Layer], dampings: Sequence[Damping], how: How) -> list[Request]:
    """The damped factors, and the last inverses for Newton-Schulz."""
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
    return requests


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
    old.copy_(_where(fits, new, old))


def _where(fits: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """`new` for the channel groups where it fits, elsewhere `old`."""
    fits = fits.reshape(-1, *(1 for _ in new.shape[1:]))
    return torch.where(fits, new.to(old.dtype), old)
