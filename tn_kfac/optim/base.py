"""What all Kronecker-factored optimizers share: groups, capture, the step, the state.

A subclass says how the factors of one layer are updated and how they precondition; see
`KroneckerOptimizer`.
"""

from __future__ import annotations

import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from tn_kfac.curvature import (
    Factors,
    ForwardScope,
    Recipe,
    Refusal,
    find_sites,
    forget_compiled,
    untold,
)
from tn_kfac.curvature.fisher import measure_fisher
from tn_kfac.optim import checkpoint, checks
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
from tn_kfac.optim.measured import check_measured, measured_apart, warn_of_ranks
from tn_kfac.optim.rules import FALLBACKS, sgd
from tn_kfac.optim.scaling import found_inf, unscale
from tn_kfac.optim.updates import kl_clipped, lengthened, smoothed


class KroneckerOptimizer(Optimizer, ABC):
    """A torch optimizer that preconditions layers with Kronecker factors.

    Every parameter group holds either parameters of layers with factors
    (`group["rule"]` is the class's `rule`) or parameters that follow a fallback rule
    (`group["rule"]` is its name). A group that a user gives is split into the two.
    """

    rule: ClassVar[str]
    option_checks: ClassVar[dict[str, checks.Check]]
    built_in: ClassVar[tuple[str, ...]] = ("structure", "kfac_approx", "loss_average", "fisher")
    _step_supports_amp_scaling = True  # torch's name: GradScaler hands over its scale

    def __init__(
        self,
        model: nn.Module,
        params: Any,
        options: Group,
        warn_unsupported: bool,
        norms: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        checks.flag("warn_unsupported", warn_unsupported)
        checks.flag("norms", norms)
        self._model = model
        self._options = self._checked(options)
        self._bindings: list[Binding] = []
        self._handles: list[RemovableHandle] = []
        self._scope = ForwardScope([])
        self._ready = False
        self._dropped: set[Tensor] = set()
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
        warn_of_ranks()
        weakref.finalize(self, _remove, self._handles)

    @abstractmethod
    def _new_state(
        self, recipe: Recipe, dtypes: tuple[torch.dtype, torch.dtype], device: torch.device
    ) -> dict[str, Tensor]:
        """Fresh factors of a layer."""

    @abstractmethod
    def _update_factors(
        self, state: dict[str, Any], factors: Factors, recipe: Recipe, group: Group
    ) -> None:
        """Update a layer's factors, in its state, from new curvature."""

    @abstractmethod
    def _precondition(
        self, state: dict[str, Any], matrix: Tensor, recipe: Recipe, group: Group
    ) -> Tensor:
        """The preconditioned joint gradient, (groups, d_out, d_in [+1])."""

    def _basis(self, state: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
        """K and C of a layer's state, if structures that read rows are to be projected by them."""
        return None

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
        forget_compiled()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients, and with them the curvature they came with."""
        super().zero_grad(set_to_none)
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

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update factors and parameters; returns the closure's loss, if there is one.

        Raises:
            RuntimeError: If a GradScaler has already unscaled the gradients, or `curvature`
                should have been called.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        empirical = any(b.tap.recipe.fisher == "empirical" for b in self._bindings)
        scale = unscale(self, empirical)
        if not found_inf(self):
            groups = {p: group for group in self.param_groups for p in group["params"]}
            directions: dict[Tensor, Tensor] = {}
            check_measured(self._bindings, lambda b: self._is_due(b, groups[b.parameters[0]]))
            for binding in self._bindings:
                group = groups[binding.parameters[0]]
                directions |= self._layer_directions(binding, group, scale)
            for group in self.param_groups:
                self._write(group, directions)
        for binding in self._bindings:
            binding.tap.clear()
        return loss

    def _is_due(self, binding: Binding, group: Group) -> bool:
        """Whether the next step updates the factors of a layer."""
        state = self.state[binding.parameters[0]]
        T: int | Callable[[int], int] = group["T"]
        step: int = state.get("step", 0)
        return step % T == 0 if isinstance(T, int) else step >= state.get("due", 0)

    def _layer_directions(
        self, binding: Binding, group: Group, scale: Tensor | None
    ) -> dict[Tensor, Tensor]:
        """Directions of one layer's parameters, after an update of its factors if that is due."""
        matrix = binding.gradient_matrix(lambda p, g: self._smoothed(p, g, group))
        if matrix is None:
            return {}
        state, recipe = self.state[binding.parameters[0]], binding.tap.recipe
        if "step" not in state:
            state |= {"step": 0} | self._new_state(recipe, binding.dtypes, matrix.device)
        due = self._is_due(binding, group)
        factors = binding.tap.factors() if due else None
        if factors is not None:
            if scale is not None and recipe.fisher == "empirical":
                factors = Factors(factors.A, factors.G / scale**2)
            self._update_factors(state, factors, recipe, group)
        T: int | Callable[[int], int] = group["T"]
        if factors is not None and not isinstance(T, int):
            state["due"] = state["step"] + max(1, T(state["step"]))
        waits = state["step"] < group["warmup"]
        direction = matrix if waits else self._precondition(state, matrix, recipe, group)
        state["step"] += not due or factors is not None  # what is due stays due
        self._tell(binding, group)
        return binding.directions(lengthened(direction, matrix, state, group))

    def _tell(self, binding: Binding, group: Group) -> None:
        """Tell a layer's tap what the next backward pass measures."""
        state, tap = self.state[binding.parameters[0]], binding.tap
        tap.enabled = self._is_due(binding, group)
        tap.basis = self._basis(state) if "step" in state else None
        tap.turn = state.get("step", 0)

    def _smoothed(self, parameter: Tensor, gradient: Tensor, group: Group) -> Tensor:
        """The gradient, or its momentum where that is preconditioned."""
        if group["precondition"] == "gradient":
            return gradient
        return smoothed(gradient, self.state[parameter], group)

    def _write(self, group: Group, directions: dict[Tensor, Tensor]) -> None:
        """Step the parameters of a group along directions, or along gradients."""
        if group["rule"] == self.rule:
            along = {p: directions[p] for p in group["params"] if p in directions}
            along = kl_clipped(along, group)
        else:
            along = {p: p.grad for p in group["params"] if p.grad is not None}
        if along:
            rule = sgd if group["rule"] == self.rule else FALLBACKS[group["rule"]]
            rule(list(along), list(along.values()), [self.state[p] for p in along], group)

    def state_dict(self) -> dict[str, Any]:
        """The state as plain tensors and numbers, none of them shared with the optimizer.

        Callables among the hyper-parameters (a scheduled `lr_cov`) are not stored.
        """
        return checkpoint.detached(super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state; factors keep the dtype that they were saved in.

        Raises:
            ValueError: If the state belongs to another model or other structures; nothing
                is changed then.
        """
        checkpoint.check_compatible(state_dict, self.param_groups, self._expected_shapes())
        checkpoint.check_options(state_dict, self.param_groups, self.built_in)
        callables = [{k: v for k, v in g.items() if callable(v)} for g in self.param_groups]
        super().load_state_dict(checkpoint.detached(state_dict))
        checkpoint.restore_dtypes(state_dict, self.param_groups, self.state)
        for group, kept in zip(self.param_groups, callables, strict=True):
            group |= {key: value for key, value in kept.items() if group.get(key) is None}
        groups = {p: group for group in self.param_groups for p in group["params"]}
        for binding in self._bindings:
            self._tell(binding, groups[binding.parameters[0]])

    def _expected_shapes(self) -> dict[Tensor, dict[str, torch.Size]]:
        """Shapes of the factors of each layer, by the parameter that owns them."""
        meta = torch.device("meta")
        return {
            b.parameters[0]: {
                key: value.shape
                for key, value in self._new_state(b.tap.recipe, b.dtypes, meta).items()
            }
            for b in self._bindings
        }

    def close(self) -> None:
        """Remove every hook from the model; the optimizer must not be used afterwards."""
        _remove(self._handles)
        forget_compiled()

    def __getstate__(self) -> dict[str, Any]:
        """Refused: a copy would not be hooked to a model."""
        raise TypeError(
            f"{type(self).__name__} is bound to its model and cannot be copied or pickled: build "
            "a new optimizer and load state_dict() into it"
        )

    def __enter__(self) -> KroneckerOptimizer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _remove(handles: list[RemovableHandle]) -> None:
    """Remove hooks, also when an optimizer that nobody closed is garbage."""
    for handle in handles:
        handle.remove()
    handles.clear()
