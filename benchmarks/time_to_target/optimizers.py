"""The optimizers; a new one is one entry of `OPTIMIZERS`.

`NAME:key=value,...` is an entry with other options, for ablations: "SINGD diagonal:T=1,norms=True".
Only weights decay, not biases, norms or positions, whatever the optimizer.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from benchmarks.time_to_target import spaces
from benchmarks.time_to_target.muon import MuonAdamW
from benchmarks.time_to_target.spaces import Space
from tn_kfac import KFAC, SINGD

Options = dict[str, Any]
Groups = list[dict[str, Any]]
BASELINES = ("SGD", "AdamW")
"""The better of these sets the target, and is what others are compared with."""


@dataclass(frozen=True)
class Entry:
    """How to build an optimizer, how it is used untuned, and what is searched."""

    make: Callable[..., torch.optim.Optimizer]
    """Called with the model, groups of its parameters, and options."""
    space: Space
    untuned: Options = field(default_factory=dict)
    """What a user would begin with, where `fixed` leaves something open."""
    fixed: Options = field(default_factory=dict)
    """Options of every run."""
    averages: bool = False
    """Whether it must be told what the loss averages over (`loss_average`)."""


def groups(model: nn.Module, weight_decay: float) -> Groups:
    """Weights, which decay, and all other parameters."""
    weights = [p for name, p in model.named_parameters() if p.ndim > 1 and "places" not in name]
    known = set(weights)
    rest = [p for p in model.parameters() if p not in known]
    parts = [
        {"params": weights, "weight_decay": weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    return [part for part in parts if part["params"]]


def build(entry: Entry, model: nn.Module, options: Options, average: str) -> torch.optim.Optimizer:
    """An optimizer of all parameters of the model, for a loss that averages over `average`."""
    options = dict(options)
    if entry.averages:
        options["loss_average"] = average
    return entry.make(model, groups(model, options.pop("weight_decay", 0.0)), **options)


def find(name: str) -> Entry:
    """An entry, with what follows a colon in the name as further options.

    Raises:
        ValueError: If there is none, or an option is not written as key=value.
    """
    base, _, extra = name.partition(":")
    if base not in OPTIMIZERS:
        raise ValueError(f"no optimizer {base!r}: there are {', '.join(OPTIMIZERS)}")
    entry = OPTIMIZERS[base]
    if not extra:
        return entry
    try:
        call = ast.parse(f"f({extra})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError(extra)
        more = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
    except (SyntaxError, ValueError):
        raise ValueError(f"{name!r}: write options as key=value,key='word'") from None
    space = entry.space
    if more.get("graft") == "adamw":
        space = spaces.GRAFTED
    elif space is not spaces.LENGTHENED:
        space = spaces.GRAFTED if more.get("update_rms") else space
    elif more.get("update_rms", True) is None:
        space = spaces.CURVATURE
    untuned = {key: value for key, value in entry.untuned.items() if key not in more}
    return replace(entry, space=space, untuned=untuned, fixed=entry.fixed | more)


def _torch(kind: Callable[..., torch.optim.Optimizer], **fixed: Any) -> Callable[..., Any]:
    def make(model: nn.Module, params: Groups, **options: Any) -> torch.optim.Optimizer:
        if "beta1" in options:
            options["betas"] = (options.pop("beta1"), options.pop("beta2", 0.999))
        return kind(params, **fixed | options)

    return make


def _ours(kind: Callable[..., torch.optim.Optimizer]) -> Callable[..., Any]:
    def make(model: nn.Module, params: Groups, **options: Any) -> torch.optim.Optimizer:
        return kind(model, params, warn_unsupported=False, **options)

    return make


def _published(name: str, beta2: float, **fixed: Any) -> Callable[..., Any]:
    """An optimizer of the package pytorch-optimizer."""

    def make(model: nn.Module, params: Groups, **options: Any) -> torch.optim.Optimizer:
        import pytorch_optimizer  # type: ignore[import-not-found]

        options["betas"] = (options.pop("beta1", 0.95), beta2)
        return getattr(pytorch_optimizer, name)(params, **fixed | options)

    return make


class Package(torch.optim.Optimizer):
    """The package `singd`, and AdamW for the parameters that it does not train."""

    def __init__(self, model: nn.Module, params: Groups, **options: Any) -> None:
        from singd.optim.optimizer import SINGD as Original

        def suits(module: nn.Module) -> bool:
            plain = type(module) is nn.Conv2d and module.groups == 1
            return plain or type(module) is nn.Linear

        decays = {p: group["weight_decay"] for group in params for p in group["params"]}
        own = {p: None for m in model.modules() if suits(m) for p in m.parameters()}
        rest = [
            group | {"params": [p for p in group["params"] if p not in own]} for group in params
        ]
        rest = [group for group in rest if group["params"]]
        decay = max(decays.values())  # weight and bias of a layer must share it
        self.parts: list[torch.optim.Optimizer] = [
            Original(model, list(own), weight_decay=decay, warn_unsupported=False, **options)
        ]
        if rest:
            self.parts.append(torch.optim.AdamW(rest, lr=options["lr"]))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        given = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(given) for _ in part.param_groups]

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()


def _singd(**fixed: Any) -> Entry:
    return Entry(_ours(SINGD), spaces.LENGTHENED, {}, fixed, averages=True)


def _kfac(**fixed: Any) -> Entry:
    return Entry(_ours(KFAC), spaces.KFAC, {}, fixed, averages=True)


ADAM_IN_EIGENBASIS: Options = {
    "ekfac": "ema", "exponent": 0.5, "damping": 1e-16, "kl_clip": None, "inverse": "qr",
    "T_inverse": 1, "precondition": "momentum", "average_momentum": True, "nesterov": True,
    "decoupled_weight_decay": True, "fallback": "adamw",
}  # fmt: skip
"""Of KFAC: Adam in the eigenbasis of the factors, as SOAP is in that of Shampoo's, with 1e-8 for ε
(https://arxiv.org/abs/2409.11321)."""


OPTIMIZERS: dict[str, Entry] = {
    "SGD": Entry(
        _torch(torch.optim.SGD, momentum=0.9, nesterov=True), spaces.SGD,
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4},
    ),
    "AdamW": Entry(_torch(torch.optim.AdamW, fused=True), spaces.ADAM, {"lr": 1e-3}),
    "Muon": Entry(MuonAdamW, spaces.MUON, {"lr": 1e-3, "weight_decay": 0.1}),
    "SOAP": Entry(
        _published("SOAP", 0.95, precondition_frequency=10), spaces.ADAM,
        {"lr": 3e-3, "weight_decay": 0.01},
    ),
    "Shampoo": Entry(  # Anil et al., "Distributed Shampoo"; Meta's package is not on PyPI
        _published(
            "ScalableShampoo", 0.999, start_preconditioning_step=10, graft_type=3,
            preconditioning_compute_steps=20, decoupled_weight_decay=True,
            moving_average_for_momentum=True,
        ),
        spaces.ADAM, {"lr": 1e-3},
    ),
    "singd (PyPI)": Entry(
        Package, spaces.CURVATURE, {"lr": 1e-3}, {"structures": ("diagonal", "diagonal")},
        averages=True,
    ),
    "SINGD diagonal": _singd(structure="diagonal"),
    "SINGD block-diagonal": _singd(structure="block30diagonal", T=10),
    "SINGD hierarchical": _singd(structure="hierarchical15_15", T=10),
    "SINGD dense T=1": _singd(structure="dense", T=1),
    "SINGD dense T=10": _singd(structure="dense", T=10),
    "KFAC": _kfac(),
    "EKFAC": _kfac(ekfac=True),
    "EKFAC Adam": Entry(
        _ours(KFAC), spaces.MUON, {"lr": 1e-2}, ADAM_IN_EIGENBASIS, averages=True
    ),
    "EKFAC Adam mc": Entry(
        _ours(KFAC), spaces.MUON, {"lr": 1e-2}, ADAM_IN_EIGENBASIS | {"fisher": "mc"},
        averages=True,
    ),
}  # fmt: skip
