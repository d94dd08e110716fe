"""SINGD's step with diagonal factors on a GPU: all layers in one launch, then all parameters.

Where updates get a length (`update_rms`), the norms of all layers take two more launches before.
What is not done here (other structures, devices and options) the optimizer does layer by layer;
both give the same up to rounding.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tn_kfac.kernels.available import available
from tn_kfac.kernels.singd import (
    FactorRule,
    LayerFactors,
    Parameters,
    SgdRule,
    Weight,
    located,
    set_lengths,
    step_parameters,
    sum_squares,
    sums,
    unchanged,
    update_factors,
)
from tn_kfac.kernels.tables import Tables
from tn_kfac.optim.binding import Active, Binding
from tn_kfac.optim.groups import Group
from tn_kfac.optim.rules import FALLBACKS, weight_of_new

KINDS = (torch.float32, torch.bfloat16, torch.float16)
State = dict[str, Any]
Member = tuple[int, Tensor, Weight]
"""A parameter, with the number of its group and how it lies in memory."""
Place = tuple[int, int]


class Fused:
    """The launches of one optimizer."""

    def __init__(self) -> None:
        self._tables = Tables()
        self._weights: dict[tuple[Any, ...], Weight | None] = {}
        self._plain: dict[tuple[torch.dtype, torch.device, int], Weight | None] = {}
        self._ones: dict[torch.device, Tensor] = {}

    def takes_factors(self, binding: Binding, state: State) -> bool:
        """Whether a layer's factors can be updated here."""
        tap = binding.tap
        if not tap.recipe.packed or torch.compiler.is_compiling():  # whose factors may be elsewhere
            return False
        K = state["K"]
        for probe in tap.probes:
            if probe.device != K.device:
                return False
        return _known(binding, K, state["C"])

    @staticmethod
    def takes_group(group: Group) -> bool:
        """Whether parameters can be stepped here by the options of their group."""
        if group["rule"] in FALLBACKS:
            return group["rule"] == "sgd" and not isinstance(group["lr"], Tensor)
        lengths = (group["graft"], group["kl_clip"])
        return lengths == (None, None) and not isinstance(group["lr"], Tensor)

    def update(self, layers: Sequence[Active], beta: float, scale: Tensor | None) -> None:
        """Update the factors of layers of one group."""
        group = layers[0].group
        ikfac, average = group["kfac_like"], group["loss_average"]
        empirical = group["fisher"] == "empirical"
        rule = FactorRule(
            damping=float(group["damping"]),
            alpha=0.0 if ikfac else float(group["alpha1"]),
            beta=float(beta),
            limit=None if group["factor_clip"] is None else float(group["factor_clip"]),
            normalised=group["normalize_lr_cov"],
            ikfac=ikfac,
            terms=2 if not empirical else 0 if average is None else 1,
        )
        tensors: dict[torch.device, list[LayerFactors]] = defaultdict(list)
        for binding, _, state, _ in layers:
            statistic = binding.tap.probes[0].grad
            assert statistic is not None
            K, C = state["K"], state["C"]
            tensors[K.device].append(
                LayerFactors(statistic, K, C, state["m_K"], state["m_C"])
            )  # fmt: skip
        for found in tensors.values():
            update_factors(self._tables, found, rule, scale if empirical else None)

    def weights(self, layer: Active) -> list[Member] | None:
        """How a layer's parameters with gradients lie in memory; None: do not step them here."""
        binding, _, state, numbers = layer
        if not binding.tap.recipe.packed:
            return None
        K, C, found = state["K"], state["C"], []
        for p, number in zip(binding.parameters, numbers, strict=True):
            gradient = p.grad
            if gradient is not None:
                strides = p.stride()
                key = (id(p), K.data_ptr(), C.data_ptr(), K.dtype, C.dtype, p.dtype, p.device,
                       strides)  # fmt: skip
                if key not in self._weights:
                    known = _known(binding, K, C)
                    self._weights[key] = _weight(binding, p, K, C) if known else None
                weight = self._weights[key]
                if weight is None or gradient.is_sparse or gradient.stride() != strides:
                    return None
                found.append((number, p, weight))
        return found

    def without_factors(self, group: Group) -> list[tuple[Tensor, Weight]] | None:
        """The parameters of a fallback's group that have gradients; None: do not step them here."""
        if torch.compiler.is_compiling() or not self.takes_group(group):
            return None
        found = []
        for p in group["params"]:
            gradient = p.grad
            if gradient is None:
                continue
            if type(p) is not torch.nn.Parameter or gradient.layout is not torch.strided:
                return None
            if not (p.is_contiguous() and gradient.is_contiguous()):
                return None
            key = (p.dtype, p.device, p.numel())
            if key not in self._plain:
                self._plain[key] = self._without(p)
            weight = self._plain[key]
            if weight is None:
                return None
            found.append((p, weight))
        return found

    def _without(self, p: Tensor) -> Weight | None:
        """How a contiguous parameter without factors lies in memory, if it may."""
        if p.dtype not in KINDS or not available(p.device) or not p.numel():
            return None
        if p.device not in self._ones:
            self._ones[p.device] = torch.ones((), device=p.device)
        return unchanged(p.numel(), self._ones[p.device])

    def step(
        self, layers: Sequence[tuple[Active, list[Member]]], groups: Sequence[Group], states: Any
    ) -> None:
        """Step the parameters of layers."""
        lengthened = [(a, found) for a, found in layers if a.group["update_rms"] is not None]
        places, rows = self._places(lengthened) if lengthened else ({}, {})
        members: list[list[tuple[Tensor, Weight]]] = [[] for _ in groups]
        for _, found in layers:
            for number, p, weight in found:
                members[number].append((p, weight))
        parts = [
            located(self._tables, part)
            for group, found in zip(groups, members, strict=True)
            for part in _parts(found, group, states, places)
        ]
        for part in parts if places else ():
            if part.given.places is not None:
                sum_squares(self._tables, part)
        for (rms, device), found in rows.items():
            set_lengths(self._tables, found, rms, device)
        for part in parts:
            step_parameters(self._tables, part)

    def step_plain(
        self, members: Sequence[tuple[Tensor, Weight]], group: Group, states: Any
    ) -> None:
        """Step parameters without factors of one group."""
        for part in _parts(members, group, states, {}):
            step_parameters(self._tables, located(self._tables, part))

    def _places(
        self, layers: Sequence[tuple[Active, list[Member]]]
    ) -> tuple[dict[Tensor, Place], dict[tuple[float, torch.device], list[tuple[int, ...]]]]:
        """Where parameters' sums of squares and layers' lengths are; and rows for `set_lengths`."""
        counts: dict[torch.device, int] = defaultdict(int)
        for _, found in layers:
            counts[found[0][1].device] += 1 + sum(sums(weight) for _, _, weight in found)
        scratch = {d: self._tables.scratch(n, d).data_ptr() for d, n in counts.items()}
        places: dict[Tensor, Place] = {}
        rows: dict[tuple[float, torch.device], list[tuple[int, ...]]] = defaultdict(list)
        for (binding, group, _, _), found in layers:
            device, recipe = found[0][1].device, binding.tap.recipe
            length, first = scratch[device], scratch[device] + 4
            after = first
            for _, p, weight in found:
                places[p] = (after, length)
                after += 4 * sums(weight)
            scratch[device] = after
            entries = recipe.layer.groups * recipe.dim_in * recipe.dim_out
            rows[float(group["update_rms"]), device].append(
                (first, (after - first) // 4, entries, length)
            )
        return places, rows


def _parts(
    members: Sequence[tuple[Tensor, Weight]], group: Group, states: Any,
    places: Mapping[Tensor, Place],
) -> list[Parameters]:  # fmt: skip
    """Parameters of one group, those of each dtype and device for themselves."""
    kinds: dict[tuple[torch.dtype, torch.device], list[tuple[Tensor, Weight]]]
    kinds = defaultdict(list)
    for p, weight in members:
        kinds[p.dtype, p.device].append((p, weight))
    rule, parts = _rule(group), []
    lengthened = group.get("update_rms") is not None
    for found in kinds.values():
        parameters, weights = zip(*found, strict=True)
        buffers = [_buffer(p, states[p]) if rule.momentum else None for p in parameters]
        own = [places[p] for p in parameters] if lengthened else None
        parts.append(Parameters(parameters, buffers, weights, rule, own))
    return parts


def _rule(group: Group) -> SgdRule:
    decoupled, decay = group["decoupled_weight_decay"], group["weight_decay"]
    first, fresh = group.get("precondition") == "momentum", weight_of_new(group)
    return SgdRule(
        lr=float(group["lr"]) * (1.0 if first else fresh),
        momentum=float(group["momentum"]),
        decay=0.0 if decoupled else float(decay),
        shrink=1.0 - group["lr"] * decay if decoupled else 1.0,
        nesterov=bool(group["nesterov"] and group["momentum"]),
        root=group.get("exponent", 1) != 1,
        first=first,
        fresh=fresh if first else 1.0,
    )


def _buffer(parameter: Tensor, state: State) -> Tensor:
    """The momentum of a parameter; zeros before its first step."""
    buffer = state.get("momentum_buffer")
    same = buffer is not None and buffer.dtype == parameter.dtype
    if buffer is None or not same or buffer.stride() != parameter.stride():
        fresh = torch.zeros_like(parameter)
        buffer = state["momentum_buffer"] = fresh if buffer is None else fresh.copy_(buffer)
    return buffer


def _known(binding: Binding, K: Tensor, C: Tensor) -> bool:
    """Whether kernels know such factors of a layer."""
    device, tap = K.device, binding.tap
    return (
        available(device)
        and C.device == device
        and K.dtype == C.dtype == tap.dtype == torch.float32
        and tap.recipe.fisher != "forward-only"  # whose G is not measured
    )


def _weight(binding: Binding, p: Tensor, K: Tensor, C: Tensor) -> Weight | None:
    """How a parameter lies in memory, if it does so in one of the ways that kernels know."""
    layer, recipe = binding.site.layer, binding.tap.recipe
    groups, outs, ins = layer.groups, layer.features_out, layer.features_in
    size = K.element_size()
    if type(p) is not torch.nn.Parameter or p.dtype not in KINDS or p.device != K.device:
        return None
    if not (K.is_contiguous() and C.is_contiguous()):
        return None
    if p is binding.bias:
        last = K.data_ptr() + (K.shape[1] - 1) * size
        known = layer.bias_is == "column" and recipe.has_bias and p.is_contiguous()
        bias = Weight(groups, last, C.data_ptr(), 1, outs, K.shape[1], C.shape[1], outs, 1)
        return bias if known else None
    factors, steps = (C.data_ptr(), K.data_ptr()), (1, K.shape[1])
    if layer.stored == "rows" and p.is_contiguous():
        return Weight(groups, *factors, outs, ins, *steps, ins, 1)
    if layer.stored == "rows" and p.dim() in (4, 5) and p.is_contiguous(memory_format=_last(p)):
        pixels = p[0, 0].numel()
        return Weight(groups, *factors, outs, ins, *steps, ins // pixels, pixels)
    if layer.stored == "columns" and p.is_contiguous() and groups == 1:
        return Weight(1, K.data_ptr(), C.data_ptr(), ins, outs, 1, outs, outs, 1)
    return None


def _last(p: Tensor) -> torch.memory_format:
    return torch.channels_last if p.dim() == 4 else torch.channels_last_3d
