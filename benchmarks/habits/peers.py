"""What the training habits share: the optimizers, a small network, data, loops, comparisons."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.published import PUBLISHED
from tn_kfac import KFAC, SINGD

OPTIONS: dict[str, Any] = {"lr": 0.02, "T": 1, "lr_cov": 0.1, "structures": ("dense", "dense")}
"""The same for both SINGDs; the others take what they know of it."""


class NotApplicable(Exception):
    """Raised by a habit that has no meaning for an optimizer."""


@dataclass(frozen=True)
class Peer:
    """An optimizer to be judged; calling it builds one."""

    name: str
    build: Callable[..., Any]
    has_factors: bool = True

    def __call__(self, model: nn.Module, params: Any = None, **options: Any) -> Any:
        """Build it on a model, with `OPTIONS` but for those given."""
        return self.build(model, params, **(OPTIONS | options))

    def need_factors(self) -> None:
        """Say that what follows has no meaning without Kronecker factors or hooks.

        Raises:
            NotApplicable: If the optimizer has none.
        """
        if not self.has_factors:
            raise NotApplicable


Table = dict[str, Callable[[Peer], None]]
"""Names of habits, and functions that raise if one does not hold."""


def _singd(model: nn.Module, params: Any, **options: Any) -> SINGD:
    return SINGD(model, params, **(PUBLISHED | options))


def _package(model: nn.Module, params: Any, **options: Any) -> Any:
    from singd.optim.optimizer import SINGD as Package

    return Package(model, params, **options)


def _adamw(
    model: nn.Module, params: Any, lr: float, weight_decay: float = 0.0, **_: Any
) -> torch.optim.Optimizer:
    params = model.parameters() if params is None else params
    return torch.optim.AdamW(params, lr=lr, weight_decay=weight_decay)


def _kfac(model: nn.Module, params: Any, **options: Any) -> KFAC:
    """With inverses in every step, and without options of SINGD's own.

    Not with eigenvectors, whose signs cannot be compared.

    Raises:
        NotApplicable: If the habit is about such an option.
    """
    if options.get("kfac_like"):
        raise NotApplicable
    apart = ("lr_cov", "structures", "kfac_like", "init_grad_scale")
    kept = {key: value for key, value in options.items() if key not in apart}
    plain = {"T_inverse": 1, "inverse": "cholesky", "damping": 0.1, "kl_clip": None}
    return KFAC(model, params, **(plain | kept))


PEERS = (
    Peer("SINGD", _singd),
    Peer("KFAC", _kfac),
    Peer("singd", _package),
    Peer("AdamW", _adamw, False),
)


def habits(table: Table, cases: Mapping[str, tuple[Any, ...]]) -> Callable[[Any], Any]:
    """Enter a function into a table under names, each with its arguments after the optimizer."""

    def enter(function: Any) -> Any:
        for name, arguments in cases.items():
            table[name] = lambda peer, arguments=arguments: function(peer, *arguments)
        return function

    return enter


def net(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Sequential:
    """Two convolutions and a Linear: layers that every one of the optimizers knows."""
    torch.manual_seed(seed)
    layers = (nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 6, 3, stride=2), nn.Tanh())
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(54, 10)).to(dtype)


def batch(step: int, size: int = 8, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Images and labels of a step."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size, 1, 8, 8, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(10, (size,), generator=generator)


def loss_of(model: Callable[..., Tensor], x: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy."""
    return nn.functional.cross_entropy(model(x), y, reduction=reduction)


def train(
    model: Any,
    optimizer: Any,
    steps: Iterable[int] = range(4),
    dtype: torch.dtype = torch.float64,
    before_step: Callable[[], Any] = lambda: None,
    after_step: Callable[[], Any] = lambda: None,
    reduction: str = "mean",
) -> list[float]:
    """The plain loop; returns the losses."""
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(model, *batch(step, dtype=dtype), reduction)
        loss.backward()
        before_step()
        optimizer.step()
        after_step()
        losses.append(loss.item())
    return losses


def state_of(optimizer: Any) -> list[Tensor]:
    """Copies of all tensors of the state, of the package's own attributes too."""
    owned = [p for group in optimizer.param_groups for p in group["params"]]
    states = (sorted(optimizer.state.get(p, {}).items()) for p in owned)
    found = [v.clone() for state in states for _, v in state if isinstance(v, Tensor)]
    for name in ("Ks", "Cs", "m_Ks", "m_Cs"):
        found += [matrix.to_dense().clone() for matrix in getattr(optimizer, name, {}).values()]
    return found


def copied(model: nn.Module) -> dict[str, Tensor]:
    """The parameters as they are now."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> list[str]:
    """Names of the parameters that equal a copy."""
    return [name for name, p in model.named_parameters() if torch.equal(p, before[name])]


def close(ours: Iterable[Any], plain: Iterable[Any], what: str, tolerance: float = 1e-7) -> None:
    """Compare numbers or tensors, each relative to the largest entry of its counterpart.

    Raises:
        AssertionError: If one is off by more than the tolerance, or is not finite.
    """
    worst = 0.0
    for one, other in zip(ours, plain, strict=True):
        a, b = (torch.as_tensor(v).detach().double() for v in (one, other))
        assert a.shape == b.shape, f"{what} of shapes {tuple(a.shape)}, {tuple(b.shape)}"
        assert a.isfinite().all() and b.isfinite().all(), f"{what} not finite"
        error = (a - b).abs().max().item() if a.numel() else 0.0
        worst = max(worst, error / max(b.abs().max().item(), 1e-12) if error else 0.0)
    assert worst <= tolerance, f"{what} off by {worst:.1g} (relative)"


def same(one: tuple[Any, Any], other: tuple[Any, Any], tolerance: float = 1e-7) -> None:
    """Compare the parameters and states of two (model, optimizer).

    Raises:
        AssertionError: If they differ by more than the tolerance.
    """
    close(one[0].parameters(), other[0].parameters(), "parameters", tolerance)
    close(state_of(one[1]), state_of(other[1]), "state", tolerance)
