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

from tn_kfac.curvature.scope import InertHook
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
        self._compiled = hasattr(model, "_orig_mod")
        self._model: nn.Module = getattr(model, "_orig_mod", model)
        self._call: tuple[tuple[Any, ...], dict[str, Any], Any] | None = None
        self._batches: list[Batch] = []

    def attach(self) -> list[RemovableHandle]:
        """Hook the model, to know its inputs and outputs."""
        return [self._model.register_forward_hook(_Called(self), with_kwargs=True)]

    def called(self, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> None:
        """A forward pass is over."""
        self._call = args, kwargs, outputs

    def note(self, outputs: Tensor, loss: nn.Module, targets: Tensor | None) -> None:
        """Its loss is known.

        Raises:
            ValueError: If these are not the outputs that the model returned last.
        """
        args, kwargs, last = self._call or ((), {}, None)
        alike = self._compiled and isinstance(last, Tensor) and last.shape == outputs.shape
        if outputs is not last and not alike:
            raise ValueError(
                "adaptive hyper-parameters call the model again: outputs must be the tensor that "
                "model(...) returned last. Move what is done to it, or picked of it, into the model"
            )
        self._batches.append(Batch(args, kwargs, loss, targets, outputs.detach()))
        self._call = None

    def clear(self) -> None:
        """Forget the step's forward passes."""
        self._batches.clear()

    def batch(self) -> Batch:
        """The step's one forward pass.

        Raises:
            RuntimeError: If there was none, or more.
        """
        if len(self._batches) != 1:
            raise RuntimeError(
                "adaptive hyper-parameters need one optimizer.curvature(outputs, loss, targets) "
                "between the forward and the backward pass of each step, got "
                f"{len(self._batches)} since the last step or optimizer.zero_grad()"
            )
        return self._batches[0]

    @staticmethod
    def value(batch: Batch, outputs: Tensor) -> Tensor:
        """The loss of outputs."""
        return batch.loss(outputs) if batch.targets is None else batch.loss(outputs, batch.targets)

    def change(self, batch: Batch) -> Tensor:
        """The batch's loss with the present parameters, less what it was; no buffer changes."""
        buffers = {name: b.clone() for name, b in self._model.named_buffers()}
        with torch.no_grad():
            now = functional_call(self._model, buffers, batch.args, batch.kwargs)
            return self.value(batch, now) - self.value(batch, batch.outputs)

    def products(self, batch: Batch, vectors: Sequence[Vector], at: Vector) -> Tensor:
        """The matrix of all vᵢᵀ F vⱼ, where parameters have the values `at`, or their own.

        Raises:
            RuntimeError: If an operation of the model has no forward-mode derivative.
        """
        parameters = {n: at.get(p, p).detach() for n, p in self._model.named_parameters()}
        names: dict[Tensor, str] = {p: name for name, p in self._model.named_parameters()}
        buffers = dict(self._model.named_buffers())

        def outputs(part: dict[str, Tensor]) -> Tensor:
            state = {k: v.clone() for k, v in buffers.items()}
            return functional_call(
                self._model, (parameters | part, state), batch.args, batch.kwargs
            )

        images, curved = [], []
        for vector in vectors:
            tangent = {names[p]: v.to(p.dtype) for p, v in vector.items()}
            primal = {name: parameters[name] for name in tangent}
            try:
                reached, image = jvp(outputs, (primal,), (tangent,))[:2]
            except (NotImplementedError, RuntimeError) as error:
                raise RuntimeError(
                    "adaptive hyper-parameters need forward-mode derivatives of the model, which "
                    f"failed: {error}. Use another implementation of that operation (for "
                    "attention: torch.nn.attention.sdpa_kernel(SDPBackend.MATH) around step), or "
                    "leave out adaptive"
                ) from error
            slope = grad(lambda o: self.value(batch, o).sum())
            images.append(image.flatten())
            curved.append(vjp(slope, reached)[1](image)[0].flatten())
        return torch.stack(images) @ torch.stack(curved).mT


class _Called:
    """The hook of an `Adaptation`; copies of the model do nothing."""

    def __init__(self, owner: Adaptation) -> None:
        self.owner = owner

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any
    ) -> None:
        """Note the inputs and outputs of a training pass."""
        if torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
            self.owner.called(args, kwargs, outputs)

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


def scaled(group: Group, factor: Tensor) -> None:
    """Multiply a group's damping, within bounds."""
    damping = torch.as_tensor(group["damping"], dtype=factor.dtype, device=factor.device)
    group["damping"] = (damping * factor).clamp(LEAST, MOST)


def by_ratio(ratio: Tensor) -> Tensor:
    """The change of the damping: it grows where the ratio is low (or no number)."""
    factor = DECAY**EVERY
    shrunk = torch.where(ratio > HIGH, factor, torch.ones_like(ratio))
    return torch.where(ratio >= LOW, shrunk, 1.0 / factor)


def is_time(state: dict[str, Any], wanted: Sequence[str]) -> bool:
    """Count a step; whether the damping follows the ratio in it."""
    state["adapted"] = state.get("adapted", 0) + 1
    return "damping" in wanted and state["adapted"] % EVERY == 0


def move(
    adaptation: Adaptation,
    groups: Sequence[Group],
    directions: Vector,
    states: Mapping[Tensor, dict[str, Any]],
    wanted: Sequence[str],
) -> None:
    """Update parameters by the best α Δ + μ δ₀, and the damping if it is time.

    An update that does not lower the batch's loss is taken back, and the damping grows at once:
    the model is no use so far away. Numbers that are not adaptive are the first group's.
    """
    batch = adaptation.batch()
    lr = None if "lr" in wanted else groups[0]["lr"]
    momentum = None if "momentum" in wanted else groups[0]["momentum"]
    down = {p: -d for p, d in directions.items()}
    last = {p: states[p]["delta"] for p in directions if "delta" in states[p]}
    vectors = [down, last] if last else [down]
    gradients = {p: p.grad for p in directions if p.grad is not None}
    F = adaptation.products(batch, vectors, {})
    overlaps = torch.stack([torch.stack([dot(v, w) for w in vectors]) for v in vectors])
    slopes = torch.stack([dot(v, gradients) for v in vectors]).to(F.dtype)
    c = coefficients(F + groups[0]["damping"] * overlaps.to(F.dtype), slopes, lr, momentum)
    deltas = {p: v * c[0] + (last[p] * c[1] if p in last else 0.0) for p, v in down.items()}
    before = {p: p.detach().clone() for p in deltas}
    for p, delta in deltas.items():
        p.add_(delta.to(p.dtype))
    actual = adaptation.change(batch)
    kept = actual <= 0
    for p, delta in deltas.items():
        p.copy_(torch.where(kept, p, before[p]))
        states[p]["delta"] = torch.where(kept, delta, 0.0).to(p.dtype)
    predicted = 0.5 * c @ F @ c + slopes @ c
    factor = torch.where(kept, torch.ones_like(actual), 1.0 / DECAY**EVERY)
    if is_time(states[next(iter(directions))], wanted):
        factor = torch.where(kept, by_ratio(_ratio(actual, predicted)), factor)
    for group in groups if "damping" in wanted else ():
        scaled(group, factor)


def follow(
    adaptation: Adaptation, groups: Sequence[Group], before: Vector, gradients: Vector
) -> None:
    """The damping after a plain update, from parameters as they were `before`."""
    batch = adaptation.batch()
    delta = {p: p.detach() - old for p, old in before.items()}
    F = adaptation.products(batch, [delta], before)
    slope = dot(delta, gradients).to(F.dtype)
    factor = by_ratio(_ratio(adaptation.change(batch), 0.5 * F[0, 0] + slope))
    for group in groups:
        scaled(group, factor)


def _ratio(actual: Tensor, predicted: Tensor) -> Tensor:
    """The reduction ratio; low, where not even the model predicts a reduction."""
    return torch.where(predicted < 0, actual / predicted, -1.0)
