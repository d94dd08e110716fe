"""First-order rules: how a direction changes parameters, in a few multi-tensor launches.

The Kronecker-factored optimizers write their preconditioned gradients with `sgd`;
parameters without factors follow the fallback rule. Both are torch's own kernels.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw
from torch.optim.sgd import sgd as torch_sgd

State = MutableMapping[str, Any]
Rule = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[State], dict[str, Any]], None]


def weight_of_new(group: dict[str, Any]) -> float:
    """How a sum of gradients, momentum's buffer, is scaled: 1, or to be an average of them."""
    return 1.0 - group["momentum"] if group.get("average_momentum") else 1.0


def sgd(
    params: Sequence[Tensor],
    directions: Sequence[Tensor],
    states: Sequence[State],
    group: dict[str, Any],
) -> None:
    """b ← momentum · b + direction + weight_decay · p;  p ← p − lr · b.

    With `nesterov`, p follows direction + momentum · b. Decoupled weight decay is no part of b:
    p ← (1 − lr · weight_decay) p first. Where the momentum is preconditioned, directions
    have it already; where AdamW is grafted, b is an average, as its first moment is.
    With `average_momentum`, p follows (1 − momentum) times that.
    """
    ready = group.get("precondition") == "momentum"
    momentum = 0.0 if ready else group["momentum"]
    coupled = 0.0 if group["decoupled_weight_decay"] else group["weight_decay"]
    if group["weight_decay"] and not coupled:
        shrunk = 1 - group["lr"] * group["weight_decay"]
        torch._foreach_mul_(list(params), shrunk)  # pyright: ignore[reportPrivateImportUsage]
    buffers = [None if ready else state.get("momentum_buffer") for state in states]
    torch_sgd(
        list(params),
        list(directions),
        buffers,
        has_sparse_grad=any(d.is_sparse for d in directions),
        weight_decay=coupled,
        momentum=momentum,
        lr=group["lr"] * (1.0 if ready else weight_of_new(group)),
        dampening=momentum if group.get("graft") == "adamw" else 0.0,
        nesterov=momentum > 0 if group["nesterov"] else False,
        maximize=False,
    )
    if momentum:
        for state, buffer in zip(states, buffers, strict=True):
            state["momentum_buffer"] = buffer


def adamw(
    params: Sequence[Tensor],
    directions: Sequence[Tensor],
    states: Sequence[State],
    group: dict[str, Any],
) -> None:
    """AdamW with β₁ = momentum, β₂ = beta2 (https://arxiv.org/abs/1711.05101).

    On a GPU in one launch, which counts steps there. Sparse directions are taken as dense ones.
    """
    directions = [d.to_dense() if d.is_sparse else d for d in directions]
    fused = _fuses(params, directions)
    for param, state in zip(params, states, strict=True):
        if "exp_avg" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        if fused:
            state["step"] = state["step"].to(param.device)
    torch_adamw(
        list(params),
        list(directions),
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        fused=fused or None,
        amsgrad=False,
        beta1=group["momentum"],
        beta2=group["beta2"],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def _fuses(params: Sequence[Tensor], directions: Sequence[Tensor]) -> bool:
    """Whether torch's fused AdamW, one launch on a GPU, takes these parameters."""
    return not torch.compiler.is_compiling() and all(
        p.is_cuda and p.is_floating_point() and d.dtype == p.dtype
        for p, d in zip(params, directions, strict=True)
    )


FALLBACKS: dict[str, Rule] = {"sgd": sgd, "adamw": adamw}
FALLBACK_EXTRAS: dict[str, dict[str, float]] = {"sgd": {}, "adamw": {"beta2": 0.999, "eps": 1e-8}}
