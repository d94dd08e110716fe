"""The optimizers that are measured; a new one is one entry of `OPTIMIZERS`.

Learning rates are small, so that random labels let no loss explode; they do not change the time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tn_kfac import KFAC, SINGD

SGD = ("SGD foreach", "SGD fused")
"""The faster one is what all others are compared with."""


class Stepper(Protocol):
    """What a training step needs of an optimizer."""

    @property
    def state(self) -> Mapping[Any, Any]:
        """Tensors that are kept between steps."""
        ...

    def step(self) -> Any:
        """Change the parameters."""
        ...

    def zero_grad(self) -> None:
        """Forget the gradients."""
        ...


@dataclass(frozen=True)
class Entry:
    """How to build an optimizer, and when it does what."""

    build: Callable[[nn.Module], Stepper]
    T: int = 1
    """Steps between updates of the factors."""
    period: int = 1
    """Steps after which its work repeats: those between inverses, if there are any."""

    def whole(self, steps: int) -> int:
        """At least so many steps that begin and end with a period."""
        return -(-steps // self.period) * self.period

    def warmup(self, steps: int) -> int:
        """Steps after which all that is done has been done, and autotuned, twice."""
        return self.whole(max(steps, 2 * self.T))


def state_bytes(optimizer: Stepper) -> int:
    """Of all tensors in an optimizer's state."""
    leaves = tree_leaves(list(optimizer.state.values()))
    return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))


def _plain(kind: Callable[..., Any], **options: Any) -> Callable[[nn.Module], Stepper]:
    """Of parameters instead of a model."""
    return lambda model: kind(model.parameters(), **options)


def _singd(T: int = 1, **options: Any) -> Entry:
    chosen = {"lr": 1e-4, "warn_unsupported": False, "T": T} | options
    return Entry(lambda model: SINGD(model, **chosen), T, T)


def _kfac(T: int, T_inverse: int, **options: Any) -> Entry:
    chosen = {"lr": 1e-4, "warn_unsupported": False, "T": T, "T_inverse": T_inverse} | options
    return Entry(lambda model: KFAC(model, **chosen), T, T_inverse)


class Package:
    """The package `singd`, and SGD for the parameters of layers that it does not know.

    Among these is the output layer of torch's attention, which would never call its hook.
    Its KFAC-reduce averages patches by a tensor network (of einconv); with `unfold`, which is how
    its KFAC-expand has them, they are unfolded and then averaged.
    """

    def __init__(self, model: nn.Module, unfold: bool) -> None:
        networks = _tensor_networks()  # before it is replaced
        from singd.optim import utils
        from singd.optim.optimizer import SINGD as Original

        utils._extract_averaged_patches = _unfolded if unfold else networks
        layers = (m for m in model.modules() if type(m) in (nn.Linear, nn.Conv2d))
        own = {p: None for layer in layers for p in layer.parameters()}
        self.own = Original(
            model, list(own), lr=1e-4, T=1, structures=("diagonal", "diagonal"),
            kfac_approx="reduce", warn_unsupported=False,
        )  # fmt: skip
        rest = [p for p in model.parameters() if p not in own]
        self.rest = torch.optim.SGD(rest, lr=1e-4, momentum=0.9) if rest else None

    @property
    def state(self) -> dict[Any, Any]:
        """With the factors, which the package keeps as attributes."""
        factors = {
            (kind, name): dict(matrix.named_tensors())
            for kind in ("Ks", "Cs", "m_Ks", "m_Cs")
            for name, matrix in getattr(self.own, kind).items()
        }
        return {**self.own.state, **(self.rest.state if self.rest else {}), **factors}

    def step(self) -> None:
        self.own.step()
        if self.rest:
            self.rest.step()

    def zero_grad(self) -> None:
        self.own.zero_grad()
        if self.rest:
            self.rest.zero_grad()


@cache
def _tensor_networks() -> Callable[..., Tensor]:
    from singd.optim import utils

    return utils._extract_averaged_patches


def _unfolded(*arguments: Any) -> Tensor:
    from singd.optim import utils

    return utils._extract_patches(*arguments).mean(1)


OPTIMIZERS: dict[str, Entry] = {
    "SGD foreach": Entry(_plain(torch.optim.SGD, lr=1e-3, momentum=0.9, foreach=True)),
    "SGD fused": Entry(_plain(torch.optim.SGD, lr=1e-3, momentum=0.9, fused=True)),
    "AdamW": Entry(_plain(torch.optim.AdamW, lr=1e-4, fused=True)),
    "SINGD": _singd(structure="diagonal", kfac_approx="reduce"),
    "SINGD expand": _singd(structure="diagonal", kfac_approx="expand"),
    "SINGD dense T=10": _singd(10, structure="dense"),
    "SINGD block30 T=10": _singd(10, structure="block30diagonal"),
    "KFAC 10/100": _kfac(10, 100),
    "KFAC 10/100 lag 90": _kfac(10, 100, lag=90),
    "KFAC 1/10": _kfac(1, 10),
    "KFAC newton-schulz 1/1": _kfac(1, 1, inverse="newton-schulz"),
    "EKFAC 10/100": _kfac(10, 100, ekfac=True),
    "singd unfold": Entry(lambda model: Package(model, unfold=True)),
    "singd TN": Entry(lambda model: Package(model, unfold=False)),
}
