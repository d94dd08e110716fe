"""Losses as negative log-likelihoods: draws from the model, and square roots of the Hessian.

s sᵀ, summed over the columns s of a square root (or, on average, over draws), is the Hessian of the
loss in the outputs (https://arxiv.org/abs/1301.3584, Section 9).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import singledispatch

import torch
from torch import Tensor, nn

LOSSES: dict[str, type[nn.Module]] = {
    "cross_entropy": nn.CrossEntropyLoss,
    "mse": nn.MSELoss,
    "bce_with_logits": nn.BCEWithLogitsLoss,
}


class Likelihood(ABC):
    """A loss at given outputs.

    Attributes:
        terms: What the loss divides its sum by; 0 for a sum.
    """

    terms: Tensor | float

    @abstractmethod
    def sample(self, generator: torch.Generator | None) -> Tensor:
        """s for labels drawn from the model, of the outputs' shape."""

    @abstractmethod
    def columns(self) -> Iterator[Tensor]:
        """All columns s of a square root of the Hessian of each example."""


class Categorical(Likelihood):
    """Cross-entropy of softmax probabilities: H = coefficient · (diag p − p pᵀ)."""

    def __init__(self, loss: nn.CrossEntropyLoss, outputs: Tensor, targets: Tensor | None) -> None:
        self.dim = 1 if outputs.dim() > 1 else 0
        self.p = outputs.movedim(self.dim, -1).softmax(-1)  # (n, …, classes)
        self.coefficient, count = _class_weights(loss, self.p, targets, self.dim)
        self.terms = count if loss.reduction == "mean" else 0.0

    def sample(self, generator: torch.Generator | None) -> Tensor:
        flat = self.p.reshape(-1, self.p.shape[-1])
        flat = torch.where(flat.isfinite().all(-1, keepdim=True), flat, 1.0)  # its row stays NaN
        labels = torch.multinomial(flat, 1, generator=generator).reshape(self.p.shape[:-1])
        one_hot = torch.zeros_like(self.p).scatter_(-1, labels[..., None], 1.0)
        return self._scaled(self.p - one_hot)

    def columns(self) -> Iterator[Tensor]:
        for label in range(self.p.shape[-1]):
            column = -self.p * self.p[..., label, None].sqrt()
            column[..., label] += self.p[..., label].sqrt()
            yield from _one_position_each(self._scaled(column), self.dim)

    def _scaled(self, rows: Tensor) -> Tensor:
        return (rows * self.coefficient.sqrt()[..., None]).movedim(-1, self.dim)


def _class_weights(
    loss: nn.CrossEntropyLoss, p: Tensor, targets: Tensor | None, dim: int
) -> tuple[Tensor, Tensor | float]:
    """The coefficient of each position (n, …), and what a mean divides by."""
    shape, classes = p.shape[:-1], p.shape[-1]
    weight = p.new_ones(classes) if loss.weight is None else loss.weight.to(p)
    if targets is None:
        if loss.weight is not None:
            raise ValueError("targets is None, but the loss weights classes: pass targets")
        return p.new_ones(shape), float(shape.numel())
    if weight.shape != (classes,):
        raise ValueError(f"the loss weights {len(weight)} classes, but outputs has {classes}")
    smoothing = loss.label_smoothing
    if targets.is_floating_point():
        _check_shape(targets, p.movedim(-1, dim))
        soft = targets.to(p).movedim(dim, -1) * (1 - smoothing) + smoothing / classes
        return soft @ weight, float(shape.numel())
    _check_shape(targets, p[..., 0])
    kept = targets != loss.ignore_index
    own = weight[torch.where(kept, targets, 0)] * kept
    smooth = own * (1 - smoothing) + kept * (smoothing * weight.mean())
    return smooth, own.sum()


def _check_shape(targets: Tensor | None, like: Tensor) -> None:
    if targets is not None and targets.shape != like.shape:
        raise ValueError(
            f"targets has shape {tuple(targets.shape)}, expected {tuple(like.shape)} for these "
            "outputs"
        )


class Gaussian(Likelihood):
    """Squared error: H = 2 I."""

    def __init__(self, loss: nn.MSELoss, outputs: Tensor) -> None:
        self.like = torch.empty_like(outputs)
        self.terms = float(outputs.numel()) if loss.reduction == "mean" else 0.0

    def sample(self, generator: torch.Generator | None) -> Tensor:
        return torch.empty_like(self.like).normal_(std=2**0.5, generator=generator)

    def columns(self) -> Iterator[Tensor]:
        yield from _one_coordinate_each(torch.full_like(self.like, 2**0.5))


class Bernoulli(Likelihood):
    """Binary cross-entropy of logits: H = coefficient · diag p (1 − p)."""

    def __init__(self, loss: nn.BCEWithLogitsLoss, outputs: Tensor, targets: Tensor | None) -> None:
        self.p = outputs.sigmoid()
        coefficient = torch.ones_like(self.p)
        if loss.pos_weight is not None:
            if targets is None:
                raise ValueError("targets is None, but the loss has pos_weight: pass targets")
            coefficient = 1 + (loss.pos_weight.to(self.p) - 1) * targets.to(self.p)
        if loss.weight is not None:
            coefficient = coefficient * loss.weight.to(self.p)
        self.coefficient = coefficient
        self.terms = float(outputs.numel()) if loss.reduction == "mean" else 0.0

    def sample(self, generator: torch.Generator | None) -> Tensor:
        uniform = torch.empty_like(self.p).uniform_(generator=generator)
        return (self.p - (uniform < self.p).to(self.p)) * self.coefficient.sqrt()

    def columns(self) -> Iterator[Tensor]:
        yield from _one_coordinate_each((self.coefficient * self.p * (1 - self.p)).sqrt())


def _one_position_each(column: Tensor, dim: int) -> Iterator[Tensor]:
    """A column (n, classes, …) for each position of an example: others have others' labels."""
    if column.dim() <= 2:
        yield column
        return
    flat = column.movedim(dim, 1).flatten(2)
    for position in range(flat.shape[2]):
        single = torch.zeros_like(flat)
        single[..., position] = flat[..., position]
        yield single.reshape(column.shape)


def _one_coordinate_each(diagonal: Tensor) -> Iterator[Tensor]:
    """Columns of the square root of a diagonal Hessian (n, …)."""
    flat = diagonal.reshape(len(diagonal), -1) if diagonal.dim() else diagonal.reshape(1, 1)
    for coordinate in range(flat.shape[1]):
        single = torch.zeros_like(flat)
        single[:, coordinate] = flat[:, coordinate]
        yield single.reshape(diagonal.shape)


@singledispatch
def likelihood(loss: nn.Module, outputs: Tensor, targets: Tensor | None) -> Likelihood:
    """The likelihood that a loss module stands for, at float32 (or wider) outputs.

    Raises:
        TypeError: If the loss has none that is known.
    """
    raise TypeError(
        f"loss must be one of {sorted(LOSSES)} or a module of their kind, got {loss!r}: use "
        "fisher='empirical' for other losses"
    )


@likelihood.register
def _(loss: nn.CrossEntropyLoss, outputs: Tensor, targets: Tensor | None) -> Likelihood:
    return Categorical(loss, outputs, targets)


@likelihood.register
def _(loss: nn.MSELoss, outputs: Tensor, targets: Tensor | None) -> Likelihood:
    _check_shape(targets, outputs)
    return Gaussian(loss, outputs)


@likelihood.register
def _(loss: nn.BCEWithLogitsLoss, outputs: Tensor, targets: Tensor | None) -> Likelihood:
    _check_shape(targets, outputs)
    return Bernoulli(loss, outputs, targets)


def loss_module(loss: str | nn.Module) -> nn.Module:
    """The loss by its name, or as it is.

    Raises:
        ValueError: If the name is unknown, or the loss is not reduced.
        TypeError: If it is neither a name nor a module.
    """
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise ValueError(f"loss={loss!r} is unknown: choose one of {sorted(LOSSES)}")
        return LOSSES[loss]()
    if not isinstance(loss, nn.Module):
        raise TypeError(f"loss must be a name or a loss module, got {loss!r}")
    reduction = getattr(loss, "reduction", "mean")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"loss has reduction={reduction!r}: use 'mean' or 'sum'")
    return loss
