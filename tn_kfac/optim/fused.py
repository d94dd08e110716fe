"""SINGD's step with diagonal factors on a GPU: all layers in one launch, then all parameters.

What is not done here (other structures, devices and options) the optimizer does layer by layer;
both give the same up to rounding.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tn_kfac.kernels.singd import (
    FactorRule,
    LayerFactors,
    SgdRule,
    Tables,
    Weight,
    available,
    step_parameters,
    update_factors,
)
from tn_kfac.optim.binding import Binding
from tn_kfac.optim.groups import Group

KINDS = (torch.float32, torch.bfloat16, torch.float16)
State = dict[str, Any]


class Fused:
    """The launches of one optimizer."""

    def __init__(self) -> None:
        self._tables = Tables()
        self._weights: dict[tuple[int, ...], Weight | None] = {}

    def takes_factors(self, binding: Binding, state: State) -> bool:
        """Whether a layer's factors can be updated here."""
        K, C = state["K"], state["C"]
        return (
            binding.tap.recipe.packed
            and K.dtype == C.dtype == binding.tap.dtype == torch.float32
            and available(K.device)
            and not torch.compiler.is_compiling()
        )

    def update(
        self, layers: Sequence[tuple[Binding, State]], group: Group, beta: float,
        scale: Tensor | None,
    ) -> None:  # fmt: skip
        """Update the factors of layers with the same options."""
        ikfac, average = group["kfac_like"], group["loss_average"]
        empirical = group["fisher"] == "empirical"
        rule = FactorRule(
            damping=group["damping"],
            alpha=0.0 if ikfac else group["alpha1"],
            beta=beta,
            limit=group["factor_clip"],
            normalised=group["normalize_lr_cov"],
            ikfac=ikfac,
            terms=2 if not empirical else 0 if average is None else 1,
        )
        tensors: dict[torch.device, list[LayerFactors]] = defaultdict(list)
        for binding, state in layers:
            (statistic,) = (probe.grad for probe in binding.tap.probes)
            assert statistic is not None
            K, C = state["K"], state["C"]
            tensors[K.device].append(
                LayerFactors(statistic, K, C, state["m_K"], state["m_C"])
            )  # fmt: skip
        for found in tensors.values():
            update_factors(self._tables, found, rule, scale if empirical else None)

    def takes_steps(self, binding: Binding, state: State, group: Group) -> bool:
        """Whether a layer's parameters can be stepped here."""
        plain = group["precondition"] == "gradient" and not isinstance(group["lr"], Tensor)
        lengths = (group["graft"], group["update_rms"], group["kl_clip"])
        if not plain or any(length is not None for length in lengths):
            return False
        return self.takes_factors(binding, state) and all(
            weight is not None for weight in self._layer_weights(binding, state).values()
        )

    def step(self, layers: Sequence[tuple[Binding, State]], group: Group, states: Any) -> None:
        """Step the parameters of layers that are in this group."""
        members = set(group["params"])
        kinds: dict[tuple[torch.dtype, torch.device], list[tuple[Tensor, Weight]]]
        kinds = defaultdict(list)
        for binding, state in layers:
            for p, weight in self._layer_weights(binding, state).items():
                if p in members and weight is not None:
                    kinds[p.dtype, p.device].append((p, weight))
        decoupled, decay = group["decoupled_weight_decay"], group["weight_decay"]
        rule = SgdRule(
            lr=group["lr"],
            momentum=group["momentum"],
            decay=0.0 if decoupled else decay,
            shrink=1.0 - group["lr"] * decay if decoupled else 1.0,
            nesterov=bool(group["nesterov"] and group["momentum"]),
            root=group["exponent"] != 1,
        )
        for found in kinds.values():
            parameters, weights = zip(*found, strict=True)
            buffers = [_buffer(p, states[p]) if rule.momentum else None for p in parameters]
            step_parameters(self._tables, parameters, buffers, weights, rule)

    def _layer_weights(self, binding: Binding, state: State) -> dict[Tensor, Weight | None]:
        """The layout of each parameter with a gradient; None: one that is not known here."""
        K, C = state["K"], state["C"]
        found = {}
        for p in binding.parameters:
            if p.grad is not None:
                key = (id(p), K.data_ptr(), C.data_ptr(), *p.stride(), 0, *p.grad.stride())
                if key not in self._weights:
                    self._weights[key] = _weight(binding, p, K, C)
                same = p.dtype == p.grad.dtype and not p.grad.is_sparse
                found[p] = self._weights[key] if same else None
        return found


def _buffer(parameter: Tensor, state: State) -> Tensor:
    """The momentum of a parameter; zeros before its first step."""
    buffer = state.get("momentum_buffer")
    if buffer is None or buffer.stride() != parameter.stride():
        fresh = torch.zeros_like(parameter)
        buffer = state["momentum_buffer"] = fresh if buffer is None else fresh.copy_(buffer)
    return buffer


def _weight(binding: Binding, p: Tensor, K: Tensor, C: Tensor) -> Weight | None:
    """How a parameter lies in memory, if it does so in one of the ways that kernels know."""
    layer, recipe = binding.site.layer, binding.tap.recipe
    groups, outs, ins = layer.groups, layer.features_out, layer.features_in
    size = K.element_size()
    strided = type(p) is not torch.nn.Parameter or p.grad is None or p.stride() != p.grad.stride()
    if strided or p.dtype not in KINDS or not (K.is_contiguous() and C.is_contiguous()):
        return None
    if p is binding.bias:
        last = K.data_ptr() + (K.shape[1] - 1) * size
        known = layer.bias_is == "column" and recipe.has_bias and p.is_contiguous()
        bias = Weight(groups, 1, outs, last, K.shape[1], C.data_ptr(), C.shape[1], outs, 1)
        return bias if known else None
    across, along = (C.data_ptr(), 1), (K.data_ptr(), K.shape[1])
    if layer.stored == "rows" and p.is_contiguous():
        return Weight(groups, outs, ins, *across, *along, ins, 1)
    if layer.stored == "rows" and p.dim() in (4, 5) and p.is_contiguous(memory_format=_last(p)):
        pixels = p[0, 0].numel()
        return Weight(groups, outs, ins, *across, *along, ins // pixels, pixels)
    if layer.stored == "columns" and p.is_contiguous() and groups == 1:
        return Weight(1, ins, outs, K.data_ptr(), 1, C.data_ptr(), outs, outs, 1)
    return None


def _last(p: Tensor) -> torch.memory_format:
    return torch.channels_last if p.dim() == 4 else torch.channels_last_3d
