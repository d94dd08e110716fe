"""Learning rate, momentum and damping from a quadratic model of the loss.

With curvature F (the exact generalised Gauss-Newton matrix of the batch, by forward-mode products),
damping λ, gradient ∇, a new direction Δ and the last update δ₀, the update δ = α Δ + μ δ₀ minimises

    M(δ) = ½ δᵀ (F + λ I) δ + ∇ᵀ δ

(https://arxiv.org/abs/1503.05671, Sections 6.4 and 7), and every few steps λ follows the
reduction ratio ρ = (h(θ + δ) − h(θ)) / (½ δᵀ F δ + ∇ᵀ δ) as Levenberg and Marquardt have it
(Section 6.5). All of it stays on the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp
from torch.utils.hooks import RemovableHandle

from tn_kfac.curvature.tap import InertHook
from tn_kfac.optim.groups import Group

ADAPTIVE = ("damping", "lr", "momentum")
EVERY, DECAY = 5, 0.95
"""Steps between changes of the damping, and its change for each of these steps."""
LOW, HIGH = 0.25, 0.75
"""Reduction ratios below which the damping grows, and above which it shrinks."""
LEAST, MOST = 1e-8, 1e8
"""Bounds of the damping."""

Vector = Mapping[Tensor, Tensor]


class Batch(NamedTuple):
    """A forward pass of the model, with its loss."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    loss: nn.Module
    targets: Tensor | None
    outputs: Tensor


class Adaptation:
    """What a model did in a step's forward pass, and what follows for the next update."""

    def __init__(self, model: nn.Module) -> None:
        self._model: nn.Module = getattr(model, "_orig_mod", model)
        self._call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._batches: list[Batch] = []

    def attach(self) -> list[RemovableHandle]:
        """Hook the model, to know its inputs."""
        return [self._model.register_forward_pre_hook(_Inputs(self), with_kwargs=True)]

    def called(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pass begins."""
        self._call = args, kwargs

    def note(self, outputs: Tensor, loss: nn.Module, targets: Tensor | None) -> None:
        """Its loss is known."""
        if self._call is not None:
            self._batches.append(Batch(*self._call, loss, targets, outputs.detach()))
            self._call = None

    def clear(self) -> None:
        """Forget the step's forward passes."""
        self._batches.clear()
        self._call = None

    def batch(self) -> Batch:
        """The step's one forward pass.

        Raises:
            RuntimeError: If there was none, or more.
        """
        if len(self._batches) != 1:
            raise RuntimeError(
                f"adaptive hyper-parameters need one optimizer.curvature(outputs, loss, targets) "
                f"between the forward and the backward pass of each step, got {len(self._batches)}"
            )
        return self._batches[0]

    @staticmethod
    def value(batch: Batch, outputs: Tensor) -> Tensor:
        """The loss of outputs."""
        return batch.loss(outputs) if batch.targets is None else batch.loss(outputs, batch.targets)

    def outputs_now(self, batch: Batch) -> Tensor:
        """The model's outputs with its present parameters; no buffer is changed."""
        buffers = {name: b.clone() for name, b in self._model.named_buffers()}
        with torch.no_grad():
            return functional_call(self._model, buffers, batch.args, batch.kwargs)

    def products(self, batch: Batch, vectors: Sequence[Vector]) -> Tensor:
        """The matrix of all vᵢᵀ F vⱼ."""
        parameters = {name: p.detach() for name, p in self._model.named_parameters()}
        names: dict[Tensor, str] = {p: name for name, p in self._model.named_parameters()}
        buffers = {name: b.clone() for name, b in self._model.named_buffers()}

        def outputs(part: dict[str, Tensor]) -> Tensor:
            state = {k: v.clone() for k, v in buffers.items()}
            return functional_call(
                self._model, (parameters | part, state), batch.args, batch.kwargs
            )

        images, curved = [], []
        for vector in vectors:
            tangent = {names[p]: v.to(p.dtype) for p, v in vector.items()}
            primal = {name: parameters[name] for name in tangent}
            reached, image = jvp(outputs, (primal,), (tangent,))[:2]
            slope = grad(lambda o: self.value(batch, o).sum())
            images.append(image.flatten())
            curved.append(vjp(slope, reached)[1](image)[0].flatten())
        return torch.stack(images) @ torch.stack(curved).mT


class _Inputs:
    """The hook of an `Adaptation`; copies of the model do nothing."""

    def __init__(self, owner: Adaptation) -> None:
        self.owner = owner

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the inputs of a training pass."""
        if torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
            self.owner.called(args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> InertHook:
        return InertHook()

    def __reduce__(self) -> tuple[type[InertHook], tuple[()]]:
        return InertHook, ()


def dot(first: Vector, second: Vector) -> Tensor:
    """The inner product of two vectors of parameters; what one lacks is zero."""
    exact = torch.float32
    parts = [
        (v.to(torch.promote_types(v.dtype, exact)) * second[p]).sum()
        for p, v in first.items()
        if p in second
    ]
    return torch.stack(parts).sum()


def coefficients(
    matrix: Tensor, slopes: Tensor, lr: float | Tensor | None, momentum: float | None
) -> Tensor:
    """The c = (α, μ) that minimises ½ cᵀ · matrix · c + slopesᵀ c; numbers given are kept.

    Shapes: matrix (n, n) and slopes (n), where n is 1 as long as there is no last update. Where
    directions are (nearly) parallel, μ is zero; what is not finite is zero too.
    """
    zero, tiny = slopes[0] * 0.0, torch.finfo(slopes.dtype).tiny
    if len(slopes) == 1:
        alpha = -slopes[0] / matrix[0, 0] if lr is None else zero + lr
        return torch.nan_to_num(alpha, 0.0, 0.0, 0.0)[None]
    (a, b), (_, d) = matrix
    r, s = -slopes
    determinant = a * d - b * b
    apart = determinant > 1e-6 * a * d
    safe = determinant.clamp(min=tiny)
    if lr is None and momentum is None:
        alpha = torch.where(apart, (r * d - s * b) / safe, r / a)
        mu = torch.where(apart, (s * a - r * b) / safe, zero)
    elif lr is None:
        assert momentum is not None
        mu = zero + momentum
        alpha = (r - b * mu) / a
    else:
        alpha = zero + lr
        mu = (s - b * alpha) / d if momentum is None else zero + momentum
    return torch.nan_to_num(torch.stack([alpha, mu]), 0.0, 0.0, 0.0)


def adapted(group: Group, ratio: Tensor) -> None:
    """Grow a group's damping where the ratio is low (or no number), shrink it where it is high."""
    factor = DECAY**EVERY
    damping = torch.as_tensor(group["damping"], dtype=ratio.dtype, device=ratio.device)
    grown = torch.where(ratio > HIGH, damping * factor, damping)
    grown = torch.where(ratio >= LOW, grown, damping / factor)
    group["damping"] = grown.clamp(LEAST, MOST)


def adapt(
    adaptation: Adaptation,
    groups: Sequence[Group],
    directions: Vector,
    states: Mapping[Tensor, dict[str, Any]],
    wanted: Sequence[str],
) -> None:
    """Update parameters along directions and last updates, and the damping if it is time.

    The damping of the first group is that of the model.
    """
    batch = adaptation.batch()
    owner = states[next(iter(directions))]
    owner["adapted"] = owner.get("adapted", 0) + 1
    lr = None if "lr" in wanted else groups[0]["lr"]
    momentum = None if "momentum" in wanted else groups[0]["momentum"]
    due = "damping" in wanted and owner["adapted"] % EVERY == 0
    down = {p: -d for p, d in directions.items()}
    last = {p: states[p]["delta"] for p in directions if "delta" in states[p]}
    if due or lr is None or momentum is None:
        vectors = [down, last] if last else [down]
        gradients = {p: p.grad for p in directions if p.grad is not None}
        F = adaptation.products(batch, vectors)
        overlaps = torch.stack([torch.stack([dot(v, w) for w in vectors]) for v in vectors])
        slopes = torch.stack([dot(v, gradients) for v in vectors]).to(F.dtype)
        damped = F + groups[0]["damping"] * overlaps.to(F.dtype)
        c = coefficients(damped, slopes, lr, momentum)
        predicted = 0.5 * c @ F @ c + slopes @ c
        _move(down, last, c.unbind(), states)
        if due:
            now = adaptation.value(batch, adaptation.outputs_now(batch))
            actual = now - adaptation.value(batch, batch.outputs)
            ratio = torch.where(predicted < 0, actual / predicted, -1.0)  # no descent: too long
            for group in groups:
                adapted(group, ratio)
    else:
        _move(down, last, (lr, momentum), states)


def _move(
    down: Vector, last: Vector, c: Sequence[Any], states: Mapping[Tensor, dict[str, Any]]
) -> None:
    """θ ← θ + α Δ + μ δ₀, which is remembered."""
    for p, step in down.items():
        delta = step * c[0]
        if p in last:
            delta = delta + last[p] * c[1]
        delta = delta.to(p.dtype)
        p.add_(delta)
        states[p]["delta"] = delta
