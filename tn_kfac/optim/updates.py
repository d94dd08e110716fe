"""What happens to a preconditioned gradient before it is written: lengths, and the KL clip.

All of it stays on the device: nothing here reads a value on the host.
"""

# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tn_kfac.optim.rules import weight_of_new
from tn_kfac.optim.sharded import own, total

State = MutableMapping[str, Any]
Group = dict[str, Any]

GRAFT_BETA, GRAFT_EPS = 0.999, 1e-8
"""Of AdamW's second moment, whose update's length is taken over."""


def lengthened(direction: Tensor, gradient: Tensor, state: State, group: Group) -> Tensor:
    """A layer's direction with the length that `graft` or `update_rms` asks for.

    Grafting (https://arxiv.org/abs/2002.11803) takes the norm of the update that the grafted
    rule would make of the layer's gradient; `update_rms` sets the root mean square. Directions
    whose squares underflow, as that of no gradient, stay small.
    """
    graft, rms = group["graft"], group["update_rms"]
    if graft is None and rms is None:
        return direction
    norm = torch.linalg.vector_norm(direction, dtype=_exact(direction))
    if graft == "sgd":
        length = gradient.norm()
    elif graft == "adamw":
        length = _adam(gradient, state).norm()
    else:
        length = rms * direction.numel() ** 0.5
    return direction * (length / norm.clamp(min=_least(norm)))


def _exact(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _least(norm: Tensor) -> float:
    """The least norm whose square is a normal number."""
    return torch.finfo(norm.dtype).tiny ** 0.5


def lengthened_shards(
    directions: Mapping[Tensor, Tensor], entries: int, group: Group
) -> dict[Tensor, Tensor]:
    """The same for `update_rms`, of this rank's shards of a layer of so many entries."""
    if group["update_rms"] is None:
        return dict(directions)
    norm = total({p: _product(d, d) for p, d in directions.items()}).sqrt()
    length = group["update_rms"] * entries**0.5 / norm.clamp(min=_least(norm))
    return {p: d * length for p, d in directions.items()}


def _adam(gradient: Tensor, state: State) -> Tensor:
    """g / (√v̂ + ε): Adam's update without its first moment, which our momentum stands for."""
    gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    if "graft_sq" not in state:
        state["graft_sq"] = torch.zeros_like(gradient)
        state["graft_step"] = 0
    state["graft_step"] += 1
    second = state["graft_sq"].mul_(GRAFT_BETA)
    second.addcmul_(gradient, gradient, value=1 - GRAFT_BETA)
    unbiased = second / (1 - GRAFT_BETA ** state["graft_step"])
    return gradient / (unbiased.sqrt() + GRAFT_EPS)


def kl_clipped(directions: Mapping[Tensor, Tensor], group: Group) -> dict[Tensor, Tensor]:
    """Directions times min(1, √(κ / |lr² Σ ⟨direction, gradient⟩|)).

    The sum is, for the exact Fisher, twice the step's change of the model's output
    distribution (https://arxiv.org/abs/1503.05671, Section 6.4, in the form that K-FAC codes use).
    """
    if group["kl_clip"] is None or not directions:
        return dict(directions)
    products = {p: _product(d, own(p.grad)) for p, d in directions.items() if p.grad is not None}
    change = total(products).abs() * group["lr"] ** 2
    shrink = (group["kl_clip"] / change).sqrt().clamp(max=1.0)
    shrink = torch.where(change.isnan(), 0.0, shrink)  # of products that overflow: no step
    return {p: d * shrink.to(d.dtype) for p, d in directions.items()}


def _product(direction: Tensor, gradient: Tensor) -> Tensor:
    exact = torch.promote_types(direction.dtype, torch.float32)
    return (direction.to(exact) * gradient).sum()


def smoothed(gradients: Sequence[Tensor], states: Sequence[State], group: Group) -> list[Tensor]:
    """b ← momentum · b + g; the buffers b, or g + momentum · b if `nesterov`.

    With `average_momentum`, 1 − momentum times that.
    """
    gradients, momentum = list(gradients), group["momentum"]
    if not momentum:
        return gradients
    known = [at for at, state in enumerate(states) if state.get("momentum_buffer") is not None]
    if known:
        old = [states[at]["momentum_buffer"] for at in known]
        torch._foreach_mul_(old, momentum)
        torch._foreach_add_(old, [gradients[at] for at in known])
    for at in set(range(len(states))).difference(known):
        states[at]["momentum_buffer"] = gradients[at].detach().clone()
    found = [state["momentum_buffer"] for state in states]
    if group["nesterov"]:
        found = torch._foreach_add(gradients, found, alpha=momentum)
    if group.get("average_momentum"):
        return list(torch._foreach_mul(found, weight_of_new(group)))
    return list(found)
