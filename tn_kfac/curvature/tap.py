"""Statistics are gradients: how curvature leaves the backward pass.

A forward hook passes a layer's output through `Tap`, an identity that also takes
*probes*: leaf tensors with the shapes of the statistics. Its backward returns the
statistics as the probes' gradients. Autograd then does the accumulation over
micro-batches and repeated calls, and decides what activation checkpointing
recomputes; and nothing but autograd keeps an activation alive.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.hooks import RemovableHandle

from tn_kfac.curvature.statistics import Factors, Recipe, statistics


class Tap(torch.autograd.Function):
    """Identity on a layer's output, whose backward hands statistics to the probes."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor | None, layer_tap: LayerTap,
                samples: Samples, *probes: Tensor) -> Tensor:  # fmt: skip
        """Return `output`; save `x`, which the layer itself has saved for its weight."""
        ctx.save_for_backward(x)
        ctx.layer_tap = layer_tap
        ctx.samples = samples
        if torch.compiler.is_compiling():
            return output.clone()  # fused away; mark_dirty does not trace on torch 2.11
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Pass the gradient on unchanged, and give each probe its statistic."""
        (gradient,) = gradients
        compiling = torch.compiler.is_compiling()
        if not compiling and not torch._C._will_engine_execute_node(ctx.next_functions[-1][0]):
            return gradient, *(None for _ in ctx.needs_input_grad[1:])
        (x,) = ctx.saved_tensors
        first = ctx.samples.count_once(ctx.layer_tap.epoch)
        return gradient, None, None, None, *ctx.layer_tap.measure(x, gradient, first)


class Samples:
    """The samples of one forward pass: counted by whichever call's backward runs first."""

    def __init__(self) -> None:
        self.counted_in = -1

    def count_once(self, epoch: int) -> bool:
        """Whether they are still to be counted in the epoch (between two `clear`)."""
        first = self.counted_in != epoch
        self.counted_in = epoch
        return first


class LayerTap:
    """The forward hook of one layer (or of several that share its parameters).

    Attributes:
        enabled: Whether forward passes are tapped; the optimizer switches it off for
            steps that do not update the curvature.
        epoch: Counts the calls of `clear`, so that samples are counted once in between.
        scope: The samples of the model's forward pass that runs now, if one does.
        latest: Those of the last one, for calls that checkpointing recomputes in backward.
    """

    def __init__(self, recipe: Recipe, dtype: torch.dtype) -> None:
        self.recipe = recipe
        self.dtype = dtype
        self.enabled = True
        self.epoch = 0
        self.scope: Samples | None = None
        self.latest: Samples | None = None
        self._probes: tuple[Tensor, ...] = ()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any],
                 output: Tensor) -> Tensor | None:  # fmt: skip
        """Forward hook: replace the output by its tapped self where gradients will flow."""
        if not (self.enabled and torch.is_grad_enabled() and output.requires_grad):
            return None
        if _transformed() or not self._trains(module):
            return None
        self._forget_discarded(module)
        x: Tensor = args[0] if args else kwargs["input"]
        saved = x if self.recipe.has_weight else None
        return Tap.apply(output, saved, self, self._samples(), *self._probes_on(output.device))

    def _trains(self, module: nn.Module) -> bool:
        """Whether one of the parameters takes gradients now."""
        return any(parameter.requires_grad for parameter in self._parameters(module))

    def _parameters(self, module: nn.Module) -> list[Tensor]:
        names = ("weight",) * self.recipe.has_weight + ("bias",) * self.recipe.has_bias
        return [getattr(module, name) for name in names]

    def _forget_discarded(self, module: nn.Module) -> None:
        """Drop statistics whose gradients were dropped: by `model.zero_grad()`, say."""
        if torch.compiler.is_compiling() or not any(p.grad is not None for p in self._probes):
            return
        if all(parameter.grad is None for parameter in self._parameters(module)):
            self.clear()

    def _samples(self) -> Samples:
        """Those of the model's forward pass, also where it is recomputed in a backward pass."""
        recomputing = torch._C._current_graph_task_id() != -1
        return self.scope or (self.latest if recomputing else None) or Samples()

    def __deepcopy__(self, memo: dict[int, Any]) -> InertHook:
        """A copy of the model (an EMA, say) is not trained by this optimizer."""
        return InertHook()

    def __reduce__(self) -> tuple[type[InertHook], tuple[()]]:
        return InertHook, ()

    def _probes_on(self, device: torch.device) -> tuple[Tensor, ...]:
        """The probes: expanded scalars, so that they need no memory."""
        if not self._probes or self._probes[0].device != device:
            zero = torch.zeros((), dtype=self.dtype, device=device)
            shapes = self.recipe.shapes()
            self._probes = tuple(zero.expand(shape).requires_grad_() for shape in shapes)
        return self._probes

    def measure(self, x: Tensor | None, gradient: Tensor, first_use: bool) -> tuple[Tensor, ...]:
        """The statistics of one call, outside of any autograd graph and autocast region."""
        x = None if x is None else x.detach()
        with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
            return statistics(self.recipe, x, gradient.detach(), self.dtype, first_use)

    def factors(self) -> Factors | None:
        """The normalised factors of all backward passes since `clear`, None without one."""
        sums = [probe.grad for probe in self._probes]
        if not sums or any(total is None for total in sums):
            return None
        return self.recipe.normalise(*sums)  # type: ignore[arg-type]

    def clear(self) -> None:
        """Forget all statistics."""
        self.epoch += 1
        for probe in self._probes:
            probe.grad = None


class ForwardScope:
    """Hooks on the model that tell its layers when a forward pass begins and ends.

    A layer that is called twice in one forward pass sees each sample twice, but the
    loss still averages over each sample once. Outside of a forward pass of the model
    (its parts called one by one) every call counts its samples.
    """

    def __init__(self, taps: Sequence[LayerTap]) -> None:
        self.taps = list(taps)

    def attach(self, model: nn.Module) -> list[RemovableHandle]:
        """Install the hooks."""
        return [
            model.register_forward_pre_hook(_ScopeHook(self, begins=True)),
            model.register_forward_hook(_ScopeHook(self, begins=False), always_call=True),
        ]

    def mark(self, tracked: bool) -> None:
        """Begin (or end) a forward pass: no layer has been called yet."""
        for tap in self.taps:
            tap.scope = Samples() if tracked else None
            tap.latest = tap.scope or tap.latest


class _ScopeHook:
    """One hook of a `ForwardScope`."""

    def __init__(self, scope: ForwardScope, begins: bool) -> None:
        self.scope = scope
        self.begins = begins

    def __call__(self, *_: Any) -> None:
        self.scope.mark(self.begins)

    def __deepcopy__(self, memo: dict[int, Any]) -> InertHook:
        return InertHook()

    def __reduce__(self) -> tuple[type[InertHook], tuple[()]]:
        return InertHook, ()


class AutocastInput:
    """Pre-hook: the cast that autocast would make inside, so layer and tap save one tensor."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or not isinstance(args[0], Tensor) or args[0].dtype != torch.float32:
            return None
        kind = args[0].device.type
        if not torch.is_autocast_enabled(kind):
            return None
        return (args[0].to(torch.get_autocast_dtype(kind)), *args[1:])


def _transformed() -> bool:
    """Whether a functional transform or forward mode runs, which wants no statistics."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


class InertHook:
    """What a hook becomes in a copied or unpickled model: nothing happens."""

    def __call__(self, *_: Any) -> None:
        """Do nothing."""
