"""Statistics are gradients: how curvature leaves the backward pass.

A forward hook passes a layer's output through `Tap`, an identity that also takes
*probes*: leaf tensors with the shapes of the statistics. Its backward returns the
statistics as the probes' gradients. Autograd then does the accumulation over
micro-batches and repeated calls, and decides what activation checkpointing
recomputes; and nothing but autograd keeps an activation alive.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as _everybody

from tn_kfac.curvature.compiled import register, traced_tap
from tn_kfac.curvature.factors import Factors, Measured
from tn_kfac.curvature.packed import PackedStatistics
from tn_kfac.curvature.scope import InertHook, Samples
from tn_kfac.curvature.statistics import Basis, Recipe, statistics
from tn_kfac.layers.base import Saved

OF_THE_LOSS = ("empirical", "forward-only")
"""Fishers whose statistics come with the gradients of the loss."""


class Tap(torch.autograd.Function):
    """Identity on a layer's output, whose backward hands statistics to the probes."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, call: tuple[LayerTap, Samples], held: bool, count: int,
                *tensors: Tensor) -> Tensor:  # fmt: skip
        """Return `output`; of `tensors`, save the first `count`, as the layer itself does.

        The others are the probes. An output that others may hold is returned itself, marked as
        changed in place: what they do with it, or what is done to it in place, has its gradient
        from here. A view (which a linear layer of tokens returns) would cost four copies of its
        gradient then; if nobody holds it, what is returned shares its memory and version alone.
        """
        ctx.save_for_backward(*tensors[:count])
        ctx.call = call
        if not held:
            return output.detach()
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Pass the gradient on unchanged, and give each probe its statistic."""
        (gradient,), (tap, samples) = gradients, ctx.call
        if not tap.recording or not _runs(ctx.next_functions[-1][0]):
            return gradient, *(None,) * (len(ctx.needs_input_grad) - 1)
        saved = ctx.saved_tensors
        tap.forget_discarded()
        tap.met.append(samples)
        statistics = tap.measure(saved, gradient, samples.count_once(tap.epoch))
        return gradient, *(None,) * (3 + len(saved)), *statistics


def _runs(node: Any) -> bool:
    """Whether the backward pass that runs now wants the gradient of a probe."""
    return torch._C._will_engine_execute_node(node)


class LayerTap:
    """The forward hook of one layer (or of several that share its parameters).

    Attributes:
        enabled: Whether forward passes are tapped; the optimizer switches it off for
            steps that do not update the curvature.
        recording: Whether backward passes are measured: always for the empirical Fisher, and
            for another one while its own backward passes run.
        measures_input: Whether they are measured for A too, or for G alone.
        met: The samples that were measured since somebody cleared this list.
        epoch: Counts the calls of `clear`, so that samples are counted once in between.
        scope: The samples of the model's forward pass that runs now, if one does.
        latest: Those of the last one, for calls that checkpointing recomputes in backward.
        trained: The parameters whose gradients say whether statistics are still wanted.
        called: Whether the layer was called in that forward pass.
        traced: Stands for the samples of a forward pass that is being compiled.
        key: By which compiled graphs know the tap.
        basis: K and C, into which structures that read rows project them; None: identities.
        turn: Which samples are measured, if not all are.
    """

    def __init__(self, recipe: Recipe, dtype: torch.dtype) -> None:
        self.recipe = recipe
        self.dtype = dtype
        self.enabled = True
        self.recording = recipe.fisher in OF_THE_LOSS
        self.measures_input = True
        self.met: list[Samples] = []
        self.epoch = 0
        self.scope: Samples | None = None
        self.latest: Samples | None = None
        self.trained: tuple[Tensor, ...] = ()
        self.called = False
        self.traced = Samples()
        self.basis: Basis = None
        self.turn = 0
        self._probes: tuple[Tensor, ...] = ()
        self._packed = PackedStatistics(recipe, dtype)
        self.key = register(self)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any],
                 output: Tensor) -> Tensor | None:  # fmt: skip
        """Forward hook: replace the output by its tapped self where gradients will flow."""
        if not (self.enabled and output.requires_grad and torch.is_grad_enabled()):
            return None
        if torch.compiler.is_compiling():
            return self._traced(module, args, kwargs, output)
        if _transformed() or not self._trains(module):
            return None
        recipe, probes = self.recipe, self._probes
        saved = recipe.layer.saved(module, args, kwargs) if recipe.has_weight else ()
        if not probes or probes[0].device != output.device:
            probes = self.probes_on(output.device)
        call = self, self.scope or self._samples()
        held = not (output._is_view() and self._is_first(module))
        return Tap.apply(output, call, held, len(saved), *saved, *probes)

    def _is_first(self, module: nn.Module) -> bool:
        """Whether no forward hook of others has seen the output before."""
        first = next(iter(module._forward_hooks.values()), None)
        return first is self and not _everybody._global_forward_hooks

    def _traced(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any],
                output: Tensor) -> Tensor | None:  # fmt: skip
        """The same in a model that is being compiled."""
        if not self._trains(module):
            return None
        saved = self.recipe.layer.saved(module, args, kwargs) if self.recipe.has_weight else ()
        first, self.called = not (self.called and self.scope is not None), True
        return traced_tap(output, self.key, first, saved, self.probes_on(output.device))

    def _trains(self, module: Any) -> bool:
        """Whether one of the parameters takes gradients now."""
        recipe = self.recipe
        return (recipe.has_weight and _requires_grad(module, "weight")) or (
            recipe.has_bias and _requires_grad(module, "bias")
        )

    def forget_discarded(self) -> None:
        """Drop statistics whose gradients were dropped: by `model.zero_grad()`, say."""
        if not has_gradient(self._probes) or has_gradient(self.trained):
            return
        if self.trained and self.recipe.fisher in OF_THE_LOSS:
            self.clear()

    def _samples(self) -> Samples:
        """Outside of the model's forward pass: its last one's where that is recomputed."""
        recomputing = torch._C._current_graph_task_id() != -1
        return (self.latest if recomputing else None) or Samples()

    def __deepcopy__(self, memo: dict[int, Any]) -> InertHook:
        """A copy of the model (an EMA, say) is not trained by this optimizer."""
        return InertHook()

    def __reduce__(self) -> tuple[type[InertHook], tuple[()]]:
        return InertHook, ()

    def probes_on(self, device: torch.device) -> tuple[Tensor, ...]:
        """The probes: expanded scalars, so that they need no memory."""
        if not self._probes or self._probes[0].device != device:
            zero = torch.zeros((), dtype=self.dtype, device=device)
            shapes = self.recipe.probe_shapes()
            self._probes = tuple(zero.expand(shape).requires_grad_() for shape in shapes)
        return self._probes

    def measure(self, saved: Saved, gradient: Tensor, first_use: bool) -> tuple[Tensor, ...]:
        """The statistics of one call, outside of any autograd graph and autocast region."""
        if self.recipe.packed and self.measures_input and self.recipe.fisher != "forward-only":
            packed = self._packed(saved, gradient, first_use, self.turn)
            if packed is not None:
                return (packed,)
        saved = tuple(tensor.detach() for tensor in saved)
        with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
            arguments = (self.recipe, saved, gradient.detach(), self.dtype)
            choices = (first_use, self.measures_input, self.basis, self.turn)
            return self.recipe.pack(statistics(*arguments, *choices))

    @property
    def probes(self) -> tuple[Tensor, ...]:
        """The leaves whose gradients are the statistics, in `Recipe.probe_shapes`; none yet: ()."""
        return self._probes

    @property
    def parts(self) -> tuple[Tensor, ...] | None:
        """A, G, counts, moments if any, of all backward passes since `clear`; None without one."""
        held = [probe.grad for probe in self._probes]
        known = [part for part in held if part is not None]
        return self.recipe.unpack(known) if held and len(known) == len(held) else None

    def replace(self, parts: Sequence[Tensor]) -> None:
        """Have these statistics instead."""
        for probe, part in zip(self._probes, self.recipe.pack(parts), strict=True):
            probe.grad = part.contiguous()

    @property
    def has_statistics(self) -> bool:
        """Whether a backward pass was measured since `clear`."""
        for probe in self._probes:
            if probe.grad is None:
                return False
        return len(self._probes) > 0

    def factors(self) -> Factors | None:
        """The normalised factors of all backward passes since `clear`, None without one."""
        parts = self.parts
        if parts is None:
            return None
        A, G, counts = parts[:3]
        return self.recipe.normalise(A, G, counts, self.basis)

    def measured(self) -> Measured | None:
        """The factors, with second moments if they are measured; None without a backward pass."""
        parts = self.parts
        return None if parts is None else self.recipe.measured(parts, self.basis)

    def clear(self) -> None:
        """Forget all statistics."""
        self.epoch += 1
        self.met.clear()
        for probe in self._probes:
            probe.grad = None


class AutocastInput:
    """Pre-hook: the cast that autocast would make inside, so layer and tap save one tensor."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not (torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled()):
            return None
        x = args[0] if args else None
        if not isinstance(x, Tensor) or x.dtype != torch.float32:
            return None
        kind = x.device.type
        if not torch.is_autocast_enabled(kind):
            return None
        return (x.to(torch.get_autocast_dtype(kind)), *args[1:])


def has_gradient(tensors: Iterable[Tensor]) -> bool:
    """Whether one of them has a gradient."""
    for tensor in tensors:  # noqa: SIM110 - a generator takes thrice as long, in every layer
        if tensor.grad is not None:
            return True
    return False


def _requires_grad(module: nn.Module, name: str) -> bool:
    """Whether a parameter takes gradients; as an attribute it is looked up by Python code."""
    parameter = module._parameters.get(name)
    return (getattr(module, name) if parameter is None else parameter).requires_grad


def _transformed() -> bool:
    """Whether a functional transform or forward mode runs, which wants no statistics."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
