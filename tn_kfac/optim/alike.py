"""Layers of equal shapes as one layer with more channel groups: fewer, larger calls.

What a step does to factors it does to each channel group for itself. So the states of layers that
are alike (the blocks of a transformer, the stages of a convolutional network) are computed
together: their tensors lie side by side in memory, each layer has a view of its own part, and the
whole is that of one layer.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tn_kfac.curvature import Measured
from tn_kfac.optim.averages import update_moments
from tn_kfac.optim.binding import Active
from tn_kfac.optim.damping import Damping, to_basis
from tn_kfac.optim.owned import OwnedOptimizer
from tn_kfac.optim.refresh import How, Layer, inverse_keys
from tn_kfac.optim.updates import lengthened

State = dict[str, Any]
LARGE = 1 << 22
"""Entries of a factor that keeps a GPU busy alone: such ones stay apart, for the memory."""
TOGETHER = 1 << 24
"""Entries of the gradients that are computed at once, for the memory."""


def joined(states: Sequence[State], keys: Iterable[str]) -> State:
    """The first state, whose tensors under these keys are those of all states, (layers, …).

    They are moved side by side, unless they lie so; the states have views of them from then on.
    """
    return {**states[0], **{key: _side_by_side(states, key) for key in keys}}


def _side_by_side(states: Sequence[State], key: str) -> Tensor:
    tensors: list[Tensor] = [state[key] for state in states]
    first = tensors[0]
    base, size, start = first._base, first.nbytes, first.data_ptr()
    if base is not None and all(
        tensor._base is base and tensor.data_ptr() == start + at * size
        for at, tensor in enumerate(tensors)
    ):
        shape = (len(tensors) * len(first), *first.shape[1:])
        return first.as_strided(shape, first.stride())
    whole = torch.cat(tensors)
    for state, part in zip(states, whole.split(len(first)), strict=True):
        state[key] = part
    return whole


def classes(active: Sequence[Active]) -> list[list[Active]]:
    """The layers, those together that may be computed as one."""
    found: dict[Hashable, list[Active]] = {}
    for at, layer in enumerate(active):
        recipe = layer.binding.tap.recipe
        spaces, kind = (recipe.input_structure, recipe.output_structure), _kind(layer.state)
        apart = layer.binding.sharded or kind is None
        key = at if apart else (id(layer.group), spaces, recipe.dim_in, recipe.dim_out, kind)
        found.setdefault(key, []).append(layer)
    return list(found.values())


def merged(due: Sequence[tuple[Layer, Damping, How]]) -> list[tuple[Layer, Damping, How]]:
    """The layers that are due, those that are alike as one.

    None that a step has in two classes, between which their states would be moved.
    """
    found: dict[Hashable, list[tuple[Layer, Damping, How]]] = {}
    for at, entry in enumerate(due):
        layer, damping, how = entry
        number = id(damping) if isinstance(damping, Tensor) else damping
        kind = _kind(layer.state)
        key = at if kind is None else (layer.group, layer.spaces, layer.dims, number, how, kind)
        found.setdefault(key, []).append(entry)
    return [entries[0] if len(entries) == 1 else _merged(entries) for entries in found.values()]


def _kind(state: State) -> Hashable:
    """What the states of layers have in common that may be computed as one; None: never so."""
    A, G = state["A"], state["G"]
    if torch.compiler.is_compiling() or len(A) != 1 or max(A.numel(), G.numel()) >= LARGE:
        return None
    times = (state["step"], state.get("updates", 0), state["inverted"])
    return A.dtype, G.dtype, A.device, "moments" in state, *times


def _merged(entries: Sequence[tuple[Layer, Damping, How]]) -> tuple[Layer, Damping, How]:
    layers = [layer for layer, _, _ in entries]
    first, damping, how = entries[0]
    keys = ["A", "G", "weight", *inverse_keys(first.state)]
    keys += ["moments"] if "moments" in first.state else []
    names = tuple(name for layer in layers for name in layer.names)
    state = joined([layer.state for layer in layers], keys)
    return Layer(names, state, first.spaces, first.dims), damping, how


class AlikeOptimizer(OwnedOptimizer):
    """An optimizer with averages A and G, that computes layers which are alike as one."""

    def _take_in(self, measured: Sequence[Active], scale: Tensor | None) -> None:
        for layers in classes(measured):
            if len(layers) == 1:
                super()._take_in(layers, scale)
                continue
            first, keys = layers[0], ["A", "G", "weight"]
            found = self._measured_together(layers, scale)
            keys += ["moments", "moments_weight"] if found.moments is not None else []
            state = joined([layer.state for layer in layers], keys)
            self._update_factors(state, found, first.binding, first.group)
            for layer in layers:
                self._count_update(layer.state, layer.group)

    def _measured_together(self, layers: Sequence[Active], scale: Tensor | None) -> Measured:
        """What was measured of layers that are alike, as of one."""
        parts = []
        for layer in layers:
            self._sums.arrive(layer.binding.tap)
            found = layer.binding.tap.parts
            assert found is not None
            parts.append(found)
        A, G, counts, *moments = zip(*parts, strict=True)
        whole = (torch.cat(A), torch.cat(G), torch.stack(counts), *map(torch.cat, moments))
        tap = layers[0].binding.tap
        return self._unscaled(tap.recipe.measured(whole, tap.basis), tap.recipe, scale)

    def _take_in_gradients(self, active: Sequence[Active]) -> None:
        """Second moments of the batch's gradients, which every step has."""
        wanted = [a for a in active if a.group["ekfac"] == "ema" and a.state["inverted"]]
        keys = ("A_basis", "G_basis", "moments", "moments_weight")
        for found in _batches(classes(wanted)):
            states, moments = [], []
            for layers in found:
                recipe, several = layers[0].binding.tap.recipe, len(layers) > 1
                state = joined([a.state for a in layers], keys) if several else layers[0].state
                matrix = _matrix(layers, _gradients(layers))
                spaces = (recipe.input_structure, recipe.output_structure)
                turned = to_basis(matrix, spaces, (state["A_basis"], state["G_basis"]))
                states.append(state)
                moments.append(turned.square())
            update_moments(states, moments, found[0][0].group["factor_decay"])

    def _directions(self, active: Sequence[Active]) -> dict[Tensor, Tensor]:
        if self._owners.apart:
            return super()._directions(active)
        found: dict[Tensor, Tensor] = {}
        alone = [layer for layer in active if _alone(layer)]
        ready = self._ready_gradients(alone)
        for layer in alone:
            found |= self._layer_directions(layer, ready)
        for several in _batches(classes([layer for layer in active if not _alone(layer)])):
            ready = self._ready_gradients([layer for layers in several for layer in layers])
            matrices = [_matrix(layers, ready) for layers in several]
            directions = self._directions_all([_joined(layers) for layers in several], matrices)
            for layers, matrix, direction in zip(several, matrices, directions, strict=True):
                found |= _handed_out(layers, matrix, direction)
        return found

    def _directions_all(self, layers: Sequence[Active], matrices: Sequence[Tensor]) -> list[Tensor]:
        """Matrices of layers of one group at one step, preconditioned unless they warm up."""
        if layers[0].state["step"] < layers[0].group["warmup"]:
            return list(matrices)
        return self._precondition_all(layers, matrices)

    def _precondition_all(
        self, layers: Sequence[Active], matrices: Sequence[Tensor]
    ) -> list[Tensor]:
        """The preconditioned joint gradients of such layers."""
        pairs = zip(layers, matrices, strict=True)
        return [self._precondition(a.state, m, a.binding.tap.recipe, a.group) for a, m in pairs]


def _gradients(layers: Sequence[Active]) -> dict[Tensor, Tensor | None]:
    return {p: p.grad for layer in layers for p in layer.binding.parameters}


def _alone(layer: Active) -> bool:
    """Whether a layer's gradient is not a plain tensor."""
    return layer.binding.sharded or any(
        p.grad is not None and p.grad.is_sparse for p in layer.binding.parameters
    )


def _joined(layers: Sequence[Active]) -> Active:
    """Layers that are alike as one that can be preconditioned."""
    first = layers[0]
    if len(layers) == 1:
        return first
    keys = inverse_keys(first.state)
    keys += [key for key in ("moments", "moments_weight") if key in first.state]
    return first._replace(state=joined([layer.state for layer in layers], keys))


def _batches(found: Sequence[list[Active]]) -> list[list[list[Active]]]:
    """Classes of one group at one step, as many as the memory for their gradients allows.

    In a compiled step, where steps are symbols, each is alone.
    """
    if torch.compiler.is_compiling():
        return [[layers] for layers in found]
    batches: dict[Hashable, list[list[list[Active]]]] = {}
    sizes: dict[Hashable, int] = {}
    for layers in found:
        binding, group, state, _ = layers[0]
        recipe = binding.tap.recipe
        size = len(layers) * recipe.layer.groups * recipe.dim_in * recipe.dim_out
        key = (id(group), state["step"], bool(state.get("updates")), binding.sharded)
        if key not in sizes or sizes[key] + size > TOGETHER:
            batches.setdefault(key, []).append([])
            sizes[key] = 0
        sizes[key] += size
        batches[key][-1].append(layers)
    return [batch for several in batches.values() for batch in several]


def _is_uniform(layers: Sequence[Active]) -> bool:
    """Whether layers have the same kinds of parameters, all of them with gradients."""
    bindings = [layer.binding for layer in layers]
    kinds = {(b.site.layer.bias_is, b.weight is None, b.bias is None) for b in bindings}
    return len(kinds) == 1 and all(p.grad is not None for b in bindings for p in b.parameters)


def _matrix(layers: Sequence[Active], ready: Mapping[Tensor, Tensor | None]) -> Tensor:
    """What is ready of layers that are alike as one joint matrix, (layers · groups, …)."""
    bindings = [layer.binding for layer in layers]
    if len(layers) == 1 or not _is_uniform(layers):
        matrices = [b.gradient_matrix(lambda p, _: _known(ready, p)) for b in bindings]
        return matrices[0] if len(layers) == 1 else torch.cat(matrices)
    weighted = [(b.site.layer, b.weight) for b in bindings if b.weight is not None]
    weights = [layer.to_matrix(_known(ready, weight)) for layer, weight in weighted]
    biases = [_known(ready, b.bias) for b in bindings if b.bias is not None]
    parts = [torch.cat(weights)] if weights else []
    parts += [torch.stack(biases)[..., None]] if biases else []
    return bindings[0].site.layer.bordered(parts)


def _handed_out(
    layers: Sequence[Active], matrices: Tensor, directions: Tensor
) -> dict[Tensor, Tensor]:
    """The directions of the parameters of layers that are alike, from their joint one.

    Each as its parameter lies in memory: multi-tensor launches want that.
    """
    group, groups = layers[0].group, len(directions) // len(layers)
    lengthy = group["graft"] is not None or group["update_rms"] is not None
    pairs = [(layer.binding.weight, layer.binding.bias) for layer in layers]
    found: dict[Tensor, Tensor] = {}
    if len(layers) == 1 or lengthy or any(p is None for p in pairs[0]) or not _is_uniform(layers):
        parts = zip(layers, matrices.split(groups), directions.split(groups), strict=True)
        for layer, matrix, part in parts:
            direction = lengthened(part, matrix, layer.state, group)
            own = layer.binding.directions(direction)
            found |= {p: _laid_out(d, p) for p, d in own.items()}
        return found
    weights, biases = layers[0].binding.site.layer.unbordered(directions)
    split = zip(layers, pairs, weights.split(groups), biases.split(groups), strict=True)
    for layer, (weight, bias), left, right in split:
        assert weight is not None and bias is not None
        own = layer.binding.site.layer.from_matrix(left, weight.shape).to(weight.dtype)
        found[weight] = _laid_out(own, weight)
        found[bias] = right.reshape(bias.shape).to(bias.dtype)
    return found


def _laid_out(direction: Tensor, parameter: Tensor) -> Tensor:
    """A direction with the strides of its parameter."""
    if direction.stride() == parameter.stride():
        return direction
    return torch.empty_like(parameter, dtype=direction.dtype).copy_(direction)


def _known(ready: Mapping[Tensor, Tensor | None], parameter: Tensor) -> Tensor:
    tensor = ready[parameter]
    assert tensor is not None
    return tensor
