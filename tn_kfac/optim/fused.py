"""SINGD's step with diagonal factors on a GPU: all layers in one launch, then all parameters.

What is not done here (other structures, devices and options) the optimizer does layer by layer;
both give the same up to rounding.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tn_kfac.kernels.available import available
from tn_kfac.kernels.singd import (
    FactorRule,
    LayerFactors,
    SgdRule,
    Tables,
    Weight,
    step_parameters,
    update_factors,
)
from tn_kfac.optim.base import KroneckerOptimizer
from tn_kfac.optim.binding import Binding
from tn_kfac.optim.groups import Group

KINDS = (torch.float32, torch.bfloat16, torch.float16)
State = dict[str, Any]


class Fused:
    """The launches of one optimizer."""

    def __init__(self) -> None:
        self._tables = Tables()
        self._weights: dict[tuple[Any, ...], Weight | None] = {}

    def takes_factors(self, binding: Binding, state: State) -> bool:
        """Whether a layer's factors can be updated here."""
        K, C = state["K"], state["C"]
        return (
            binding.tap.recipe.packed
            and binding.tap.recipe.fisher != "forward-only"  # whose G is not measured
            and K.dtype == C.dtype == binding.tap.dtype == torch.float32
            and all(tensor.device == K.device for tensor in (C, *binding.tap.probes))
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
            damping=float(group["damping"]),
            alpha=0.0 if ikfac else float(group["alpha1"]),
            beta=float(beta),
            limit=None if group["factor_clip"] is None else float(group["factor_clip"]),
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

    def weights(
        self, binding: Binding, state: State, groups: Sequence[Group]
    ) -> dict[Tensor, Weight] | None:
        """How a layer's parameters with gradients lie in memory; None: do not step them here."""
        for group in groups:
            lengths = (group["graft"], group["update_rms"], group["kl_clip"])
            if group["precondition"] != "gradient" or lengths != (None, None, None):
                return None
            if isinstance(group["lr"], Tensor):
                return None
        if not self.takes_factors(binding, state):
            return None
        K, C, found = state["K"], state["C"], {}
        for p in binding.parameters:
            gradient = p.grad
            if gradient is not None:
                key = (id(p), K.data_ptr(), C.data_ptr(), p.dtype, p.device, p.stride())
                if key not in self._weights:
                    self._weights[key] = _weight(binding, p, K, C)
                weight = self._weights[key]
                if weight is None or gradient.is_sparse or gradient.stride() != p.stride():
                    return None
                found[p] = weight
        return found

    def step(self, members: Sequence[tuple[Tensor, Weight]], group: Group, states: Any) -> None:
        """Step parameters of one group."""
        kinds: dict[tuple[torch.dtype, torch.device], list[tuple[Tensor, Weight]]]
        kinds = defaultdict(list)
        for p, weight in members:
            kinds[p.dtype, p.device].append((p, weight))
        decoupled, decay = group["decoupled_weight_decay"], group["weight_decay"]
        rule = SgdRule(
            lr=float(group["lr"]),
            momentum=float(group["momentum"]),
            decay=0.0 if decoupled else float(decay),
            shrink=1.0 - group["lr"] * decay if decoupled else 1.0,
            nesterov=bool(group["nesterov"] and group["momentum"]),
            root=group["exponent"] != 1,
        )
        for found in kinds.values():
            parameters, weights = zip(*found, strict=True)
            buffers = [_buffer(p, states[p]) if rule.momentum else None for p in parameters]
            step_parameters(self._tables, parameters, buffers, weights, rule)


def _buffer(parameter: Tensor, state: State) -> Tensor:
    """The momentum of a parameter; zeros before its first step."""
    buffer = state.get("momentum_buffer")
    same = buffer is not None and buffer.dtype == parameter.dtype
    if buffer is None or not same or buffer.stride() != parameter.stride():
        fresh = torch.zeros_like(parameter)
        buffer = state["momentum_buffer"] = fresh if buffer is None else fresh.copy_(buffer)
    return buffer


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


class FusedOptimizer(KroneckerOptimizer):
    """An optimizer that updates and uses diagonal factors as SINGD does, at once where it can."""

    _fused: Fused

    @abstractmethod
    def _beta(self, state: State, group: Group) -> float:
        """The step size of a layer's factors now."""

    def _take_in(self, measured: Sequence[tuple[Binding, Group]], scale: Tensor | None) -> None:
        """All layers that `Fused` knows at once, the others one after another."""
        fused, rest = [], []
        for binding, group in measured:
            state = self.state[binding.parameters[0]]
            starts = group["init"] == "curvature" and not state.get("started")
            if starts or not self._fused.takes_factors(binding, state):
                rest.append((binding, group))
            else:
                fused.append((binding, group))
        for group in self.param_groups if fused else ():
            alike: dict[float, list[tuple[Binding, dict[str, Any]]]] = defaultdict(list)
            for binding in (b for b, own in fused if own is group):
                state = self.state[binding.parameters[0]]
                alike[self._beta(state, group)].append((binding, state))
            for beta, layers in alike.items():
                self._fused.update(layers, group, beta, scale)
                for _, state in layers:
                    self._count_update(state, group)
        super()._take_in(rest, scale)

    def _step_layers(
        self, active: Sequence[tuple[Binding, Group]], counted: Sequence[bool]
    ) -> None:
        rest, waits, where = [], [], self._where()
        fused: dict[Tensor, Weight] = {}
        for (binding, group), counts in zip(active, counted, strict=True):
            state = self.state[binding.parameters[0]]
            groups = [where[p] for p in binding.parameters]
            ready = state["step"] >= group["warmup"]
            weights = self._fused.weights(binding, state, groups) if ready else None
            if weights is None:
                rest.append((binding, group))
                waits.append(counts)
                continue
            fused |= weights
            self._count_step(binding, group, counts)
        super()._step_layers(rest, waits)
        for group in self.param_groups if fused else ():
            members = [(p, fused[p]) for p in group["params"] if p in fused]
            if members:
                self._fused.step(members, group, self.state)
