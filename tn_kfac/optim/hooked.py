"""An optimizer that is hooked to a model: its groups, its layers, what their taps capture.

How a step uses what was captured is `KroneckerOptimizer`'s.
"""

from __future__ import annotations

import warnings
import weakref
from abc import ABC
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from tn_kfac.curvature import ForwardScope, Refusal, find_sites, forget_compiled, untold
from tn_kfac.curvature.fisher import measure_fisher
from tn_kfac.optim import checks
from tn_kfac.optim.binding import Binding, bind, check_patterns
from tn_kfac.optim.groups import (
    COMMON_KEYS,
    Group,
    as_groups,
    check_entries,
    entries_of,
    parameter,
    split,
    untrained,
    warn_untrained,
)
from tn_kfac.optim.measured import measured_apart
from tn_kfac.optim.ranks import Sums, check_group, check_reduce_dtype


class HookedOptimizer(Optimizer, ABC):
    """A torch optimizer whose layers are tapped.

    Every parameter group holds either parameters of layers with factors
    (`group["rule"]` is the class's `rule`) or parameters that follow a fallback rule
    (`group["rule"]` is its name). A group that a user gives is split into the two.
    """

    rule: ClassVar[str]
    option_checks: ClassVar[dict[str, checks.Check]]
    _step_supports_amp_scaling = True  # torch's name: GradScaler hands over its scale

    def __init__(
        self,
        model: nn.Module,
        params: Any,
        options: Group,
        warn_unsupported: bool,
        norms: bool = False,
        process_group: Any = None,
        reduce_dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        checks.flag("warn_unsupported", warn_unsupported)
        checks.flag("norms", norms)
        check_group("process_group", process_group)
        check_reduce_dtype("reduce_dtype", reduce_dtype)
        self._process_group = process_group
        self._model = model
        self._options = self._checked(options)
        self._bindings: list[Binding] = []
        self._handles: list[RemovableHandle] = []
        self._scope = ForwardScope([])
        self._ready = self._closed = False
        self._dropped: set[Tensor] = set()
        self._sums = Sums(dtype=reduce_dtype)
        sites, refused = find_sites(model, norms)
        check_patterns(self._options["structure"], [site.name for site in sites])
        self._sites = {p: site for site in sites for p in site.parameters}
        groups = as_groups(model.parameters() if params is None else params)
        super().__init__(groups, {key: options[key] for key in COMMON_KEYS})
        if warn_unsupported:
            self._warn(refused, params is None)
        self._attach()
        self._handles += self._scope.attach(model)
        self._ready = True
        weakref.finalize(self, _remove, self._handles)

    def _check_binding(self, binding: Binding, group: Group) -> None:
        """Check a layer's options against its structures, before it is hooked.

        Raises:
            ValueError: If they do not fit.
        """

    def _checked(self, options: Group) -> Group:
        """Options after their checks, with structures and dtypes as pairs."""
        checks.check(options, checks.COMMON | self.option_checks)
        return options | {
            "structure": checks.structures(options["structure"]),
            "preconditioner_dtype": checks.dtype_pair(options["preconditioner_dtype"]),
        }

    def _warn(self, refused: list[Refusal], all_parameters: bool) -> None:
        refused = untold(refused, {p for group in self.param_groups for p in group["params"]})
        if refused:
            said = "; ".join(map(str, refused))
            warnings.warn(f"trained without Kronecker factors: {said}", stacklevel=4)
        wanted = [
            (name, p)
            for name, p in self._model.named_parameters()
            if all_parameters or p in self._dropped
        ]
        names = untrained(self.param_groups, wanted)
        if names:
            warn_untrained(names)

    def add_param_group(self, param_group: Group) -> None:
        """Add parameters of the model, split by whether Kronecker factors serve them.

        Raises:
            TypeError: If the group or an entry has the wrong type.
            ValueError: If an option is out of range, a parameter is not in the model, is
                there twice, or its layer's other parameter was added before.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, got {type(param_group).__name__}")
        given = param_group | {"params": entries_of(param_group["params"])}
        present = {p for group in self.param_groups for p in group["params"]}
        check_entries(given["params"], set(self._model.parameters()), present)
        options = self._checked(self._options | {k: v for k, v in given.items() if k != "params"})
        options = {key: options[key] for key in self._options}
        before = len(self.param_groups)
        for group in split(given, options, self._sites, self.rule):
            super().add_param_group(group)
        kept = {p for group in self.param_groups for p in group["params"]}
        self._dropped |= {p for p in map(parameter, given["params"]) if p not in kept}
        if self._ready:
            try:
                self._attach()
            except ValueError:
                del self.param_groups[before:]
                raise

    def _attach(self) -> None:
        """Bind and hook the layers of all parameters that joined since the last call."""
        where = {p: group for group in self.param_groups for p in group["params"]}
        new = bind(self._sites, where, self._bindings, self.rule, tuple(self.option_checks))
        for binding in new:
            self._check_binding(binding, where[binding.parameters[0]])
        for binding in new:
            self._handles += binding.attach()
        self._bindings += new
        self._scope.taps += [binding.tap for binding in new]
        if new:
            forget_compiled()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients, and with them the curvature they came with."""
        super().zero_grad(set_to_none)
        self._clear()

    def _clear(self) -> None:
        """Forget what was measured."""
        for binding in self._bindings:
            binding.tap.clear()

    def curvature(
        self,
        outputs: Tensor,
        loss: str | nn.Module,
        targets: Tensor | None = None,
        samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        """Measure the curvature of a batch, for fisher="mc" and "type-2".

        To be called after the forward pass and before the backward pass of each (micro-)batch;
        for the other kinds of Fisher, and on steps that update no factors, it does nothing.
        Gradients of parameters are neither computed nor changed.

        >>> outputs = model(x)
        >>> optimizer.curvature(outputs, loss_fn, targets)
        >>> loss_fn(outputs, targets).backward()

        Args:
            outputs: Of the model, as the loss takes them.
            loss: "cross_entropy", "mse" or "bce_with_logits", or a module of their kind with
                its options (class weights, ignore_index, label smoothing, reduction).
            targets: Needed where the loss weights classes or ignores an index.
            samples: How many labels to draw for each example ("mc").
            generator: Of these draws.

        Raises:
            ValueError: If an argument is out of range, or outputs carry no graph.
            TypeError: If the loss is of an unknown kind.
        """
        checks.interval("samples", samples)
        for taps in measured_apart(self._bindings):
            measure_fisher(taps, outputs, loss, targets, samples, generator)
        self._note(outputs, loss, targets)

    def _note(self, outputs: Tensor, loss: str | nn.Module, targets: Tensor | None) -> None:
        """What an optimizer itself wants to know of a batch."""

    def close(self) -> None:
        """Remove every hook from the model; the optimizer cannot step afterwards."""
        self._closed = True
        _remove(self._handles)
        forget_compiled()

    def __getstate__(self) -> dict[str, Any]:
        """Refused: a copy would not be hooked to a model."""
        raise TypeError(
            f"{type(self).__name__} is bound to its model and cannot be copied or pickled: build "
            "a new optimizer and load state_dict() into it"
        )

    def __enter__(self) -> HookedOptimizer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _remove(handles: list[RemovableHandle]) -> None:
    """Remove hooks, also when an optimizer that nobody closed is garbage."""
    for handle in handles:
        handle.remove()
    handles.clear()
