"""What all Kronecker-factored optimizers share: the step.

A subclass says how the factors of one layer are updated and how they precondition; see
`KroneckerOptimizer`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from tn_kfac.curvature import Measured, Recipe
from tn_kfac.curvature.tap import has_gradient
from tn_kfac.optim import checks
from tn_kfac.optim.binding import Active, Binding
from tn_kfac.optim.groups import Group
from tn_kfac.optim.measured import check_measured
from tn_kfac.optim.ranks import ranks_of
from tn_kfac.optim.rules import FALLBACKS, sgd
from tn_kfac.optim.saved import SavedOptimizer
from tn_kfac.optim.scaling import found_inf, unscale
from tn_kfac.optim.sharded import check_same, is_sharded, own, write
from tn_kfac.optim.updates import kl_clipped, lengthened, lengthened_shards, smoothed

Vector = Mapping[Tensor, Tensor]


class KroneckerOptimizer(SavedOptimizer):
    """A hooked optimizer that preconditions layers with Kronecker factors."""

    built_in: ClassVar[tuple[str, ...]] = ("structure", "kfac_approx", "loss_average", "fisher")
    option_checks: ClassVar[dict[str, checks.Check]] = {
        "T": checks.intervals,
        "loss_average": lambda n, v: checks.one_of(n, v, (None, "batch", "batch+sequence")),
        "structure": lambda name, value: checks.structures(value),
        "kfac_approx": lambda n, v: checks.one_of(n, v, ("expand", "reduce")),
        "fisher": lambda n, v: checks.one_of(n, v, ("empirical", "mc", "type-2", "forward-only")),
        "preconditioner_dtype": lambda name, value: checks.dtype_pair(value),
        "exponent": lambda n, v: checks.one_of(n, v, (1, 0.5)),
        "precondition": lambda n, v: checks.one_of(n, v, ("gradient", "momentum")),
        "graft": lambda n, v: checks.one_of(n, v, (None, "sgd", "adamw")),
        "update_rms": checks.optional,
        "kl_clip": checks.optional,
        "curvature_fraction": checks.fraction,
        "warmup": lambda name, value: checks.interval(name, value, least=0),
    }

    @abstractmethod
    def _update_factors(
        self, state: dict[str, Any], captured: Measured, binding: Binding, group: Group
    ) -> None:
        """Update a layer's factors, in its state, from new curvature."""

    def _refresh(self, active: Sequence[Active]) -> None:
        """Whatever follows from the factors of all layers of this step, done together."""

    @abstractmethod
    def _precondition(
        self, state: dict[str, Any], matrix: Tensor, recipe: Recipe, group: Group
    ) -> Tensor:
        """The preconditioned joint gradient, (groups, d_out, d_in [+1])."""

    def _basis(self, binding: Binding, state: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
        """What the next backward pass measures a layer in: K and C, or Q_A and Q_G, if any."""
        return None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update factors and parameters; returns the closure's loss, if there is one.

        Raises:
            RuntimeError: If the optimizer was closed, a scaler other than torch's has unscaled the
                gradients, `curvature` should have been called, or parameters were sharded since
                the optimizer was built.
        """
        if self._closed:
            raise RuntimeError("the optimizer was closed, so nothing measures curvature: build one")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        empirical = any(b.tap.recipe.fisher == "empirical" for b in self._bindings)
        scale = unscale(self, empirical)
        if not found_inf(self):
            active = self._active()
            check_measured(active, self._is_due)
            self._check_step()
            self._share(active)
            due = [self._is_ready(layer) for layer in active]
            measured = [layer for layer, ready in zip(active, due, strict=True) if ready]
            self._take_in(measured, scale)
            self._sums.end()
            self._refresh(active)
            self._step_layers(active, [ready is not False for ready in due])
        self._clear()
        return loss

    def _active(self) -> list[Active]:
        """The layers with gradients.

        Raises:
            RuntimeError: If another one's parameters were replaced.
        """
        where, found = self._where(), []
        for binding in self._bindings:
            parameters = binding.parameters
            if has_gradient(parameters):
                numbers = [where[id(p)] for p in parameters]
                group, state = self.param_groups[numbers[0]], self.state[parameters[0]]
                found.append(Active(binding, group, state, numbers))
            elif not binding.sharded:
                owned = {"weight": binding.weight, "bias": binding.bias}
                check_same(binding.site.name, binding.site.modules, owned)
        return found

    def _check_step(self) -> None:
        """Check whatever else the step needs, before anything is changed."""

    def _share(self, active: Sequence[Active]) -> None:
        """Begin to sum the statistics of the layers that are due over all ranks."""
        if ranks_of(self._process_group) > 1:
            taps = [layer.binding.tap for layer in active if self._is_due(layer)]
            self._sums.begin([tap for tap in taps if tap.probes], self._process_group)

    def _is_due(self, layer: Active) -> bool:
        """Whether the next step updates the factors of a layer."""
        T: int | Callable[[int], int] = layer.group["T"]
        step: int = layer.state.get("step", 0)
        return step % T == 0 if isinstance(T, int) else step >= layer.state.get("due", 0)

    def _is_ready(self, layer: Active) -> bool | None:
        """Whether a layer was measured for an update that is due; None: it is not due."""
        binding, group, state, _ = layer
        if "step" not in state:
            device = binding.parameters[0].device
            state |= {"step": 0} | self._new_state(binding, group, device)
        return binding.tap.has_statistics if self._is_due(layer) else None

    def _take_in(self, measured: Sequence[Active], scale: Tensor | None) -> None:
        """Update the factors of layers that were measured, of a loss times `scale`."""
        for layer in measured:
            binding, group, state, _ = layer
            self._update_factors(state, self._measured(layer, scale), binding, group)
            self._count_update(state, group)

    def _measured(self, layer: Active, scale: Tensor | None) -> Measured:
        """What was measured of a layer, of a loss times `scale`, and of the loss."""
        tap = layer.binding.tap
        self._sums.arrive(tap)
        found = tap.measured()
        assert found is not None
        return self._unscaled(found, tap.recipe, scale)

    @staticmethod
    def _unscaled(found: Measured, recipe: Recipe, scale: Tensor | None) -> Measured:
        """What was measured of a loss times `scale`, of the loss."""
        return found if scale is None or recipe.fisher != "empirical" else found.unscaled(scale)

    def _step_layers(self, active: Sequence[Active], counted: Sequence[bool]) -> None:
        """Step all parameters; for a layer that waits for its measurement the step counts not."""
        directions = self._directions(active)
        for layer, counts in zip(active, counted, strict=True):
            self._count_step(layer, counts)
        self._write_all(directions)

    def _count_step(self, layer: Active, counts: bool) -> None:
        """Go on to a layer's next step."""
        if counts:
            layer.state["step"] += 1
        self._tell(layer)

    def _directions(self, active: Sequence[Active]) -> dict[Tensor, Tensor]:
        """Directions of the parameters of all layers."""
        found: dict[Tensor, Tensor] = {}
        ready = self._ready_gradients(active)
        for layer in active:
            found |= self._layer_directions(layer, ready)
        return found

    def _ready_gradients(self, layers: Sequence[Active]) -> dict[Tensor, Tensor]:
        """What of each parameter is preconditioned: its gradient, or the momentum of that."""
        found: dict[Tensor, Tensor] = {}
        alike: dict[tuple[int, int], dict[Tensor, Tensor]] = defaultdict(dict)
        for layer in layers:
            for p, number in zip(layer.binding.parameters, layer.numbers, strict=True):
                if p.grad is None:
                    continue
                if self.param_groups[number]["precondition"] == "gradient":
                    found[p] = p.grad
                else:
                    alike[number, id(p) if is_sharded(p) else 0][p] = p.grad
        for (number, _), pairs in alike.items():
            states, group = [self.state[p] for p in pairs], self.param_groups[number]
            found |= zip(pairs, smoothed(list(pairs.values()), states, group), strict=True)
        return found

    def _layer_directions(self, layer: Active, ready: Vector) -> dict[Tensor, Tensor]:
        """Directions of one layer's parameters, by its newest factors, along what is ready."""
        binding, group, state, _ = layer
        if binding.sharded and binding.entrywise and group["graft"] is None:
            return self._shard_directions(layer, ready)
        matrix = self._gradient(layer, ready)
        direction = self._direction(layer, matrix)
        return binding.directions(lengthened(direction, matrix, state, group))

    def _gradient(self, layer: Active, ready: Vector) -> Tensor:
        """What of a layer is preconditioned, as a matrix."""
        return layer.binding.gradient_matrix(lambda p, _: ready[p])

    def _direction(self, layer: Active, matrix: Tensor) -> Tensor:
        """It, preconditioned, unless the layer still warms up."""
        binding, group, state, _ = layer
        if state["step"] < group["warmup"]:
            return matrix
        return self._precondition(state, matrix, binding.tap.recipe, group)

    def _shard_directions(self, layer: Active, ready: Vector) -> dict[Tensor, Tensor]:
        """Those of a sharded layer with diagonal factors: of this rank's shards alone.

        For their length, ranks sum one number.
        """
        binding, group, recipe = layer.binding, layer.group, layer.binding.tap.recipe
        shape = (recipe.layer.groups, recipe.dim_out, recipe.dim_in)
        ones = torch.ones(shape, dtype=binding.dtypes[1], device=binding.parameters[0].device)
        scales = self._direction(layer, ones)
        directions = binding.scaled(scales, lambda p, _: ready[p])
        return lengthened_shards(directions, scales.numel(), group)

    def _checked(self, options: Group) -> Group:
        options = super()._checked(options)
        if options["graft"] is not None and options["update_rms"] is not None:
            raise ValueError(
                f"graft={options['graft']!r} and update_rms={options['update_rms']} both set the "
                "length of an update: give one, and None for the other"
            )
        if options["graft"] == "adamw" and options["nesterov"]:
            raise ValueError(
                "graft='adamw' has AdamW's averaged momentum, which nesterov=True would lengthen: "
                "give nesterov=False"
            )
        if options["graft"] == "adamw" and options["average_momentum"]:
            raise ValueError(
                "graft='adamw' has AdamW's averaged momentum, which average_momentum=True would "
                "average again: leave it out"
            )
        return options

    def _count_update(self, state: dict[str, Any], group: Group) -> None:
        """Note that factors were updated, and when they are next, if `T` is a callable."""
        state["updates"] = state.get("updates", 0) + 1
        T: int | Callable[[int], int] = group["T"]
        if not isinstance(T, int):
            wait = T(state["step"])
            checks.interval("T(step)", wait)
            state["due"] = state["step"] + wait

    def _tell(self, layer: Active) -> None:
        """Tell a layer's tap what the next backward pass measures."""
        binding, state = layer.binding, layer.state
        tap = binding.tap
        tap.enabled = self._is_due(layer)
        tap.basis = self._basis(binding, state) if "step" in state else None
        tap.turn = state.get("updates", 0)

    def _write_all(self, directions: dict[Tensor, Tensor]) -> None:
        """Step all parameters."""
        for group in self.param_groups:
            self._write(group, directions)

    def _write(self, group: Group, directions: dict[Tensor, Tensor]) -> None:
        """Step the parameters of a group along directions, or along gradients."""
        if group["rule"] == self.rule:
            if not directions:
                return
            along = {p: directions[p] for p in group["params"] if p in directions}
            along = kl_clipped(along, group)
        else:
            along = {p: own(p.grad) for p in group["params"] if p.grad is not None}
        if along:
            rule = sgd if group["rule"] == self.rule else FALLBACKS[group["rule"]]
            write(rule, along, self.state, group)
