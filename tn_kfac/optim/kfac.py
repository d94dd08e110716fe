"""KFAC and EKFAC: natural gradient descent with Kronecker-factored curvature."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from tn_kfac.curvature import Measured, Recipe
from tn_kfac.curvature.statistics import Fisher
from tn_kfac.optim import checks, intervals, pending, refresh
from tn_kfac.optim.adapted import AdaptedOptimizer
from tn_kfac.optim.adaptive import Adaptation
from tn_kfac.optim.averages import update_averages, update_moments
from tn_kfac.optim.binding import Active, Binding
from tn_kfac.optim.damping import Turned, by_inverses, in_eigenbasis
from tn_kfac.optim.groups import Group
from tn_kfac.optim.inverses import EIGEN, Inverse, warm_iterations
from tn_kfac.optim.kfac_options import OPTION_CHECKS, SHARING, check_layer, checked, damping_now
from tn_kfac.optim.notice import Notice
from tn_kfac.optim.owners import Owners
from tn_kfac.optim.shared_inverses import costs
from tn_kfac.optim.singd import Structures


class KFAC(AdaptedOptimizer):
    r"""Kronecker-factored approximate curvature, with a fallback for all the rest.

    The gradient G of each layer's weight (with its bias as an extra column) is multiplied by the
    damped inverse of G ⊗ A, where A and G are moving averages of the second moments of the
    layer's inputs and output gradients (https://arxiv.org/abs/1503.05671; for convolutions and
    other shared weights https://arxiv.org/abs/2311.00636). With `ekfac`, the eigenvalues of the
    product are replaced by second moments in its eigenbasis (https://arxiv.org/abs/1806.03884).
    Then weight decay and momentum as in `torch.optim.SGD`. Grouped convolutions have one exact
    pair of factors for each channel group.

    Curvature (hooks, kinds of layers and of Fisher), param groups, the fallback for parameters
    without Kronecker factors, and the arguments that are not listed are those of `SINGD`.

    Args:
        model: The network that is trained.
        params: Parameters, or groups of them; all parameters of the model if None.
        lr: Learning rate.
        momentum: Of the update, or of gradients (`precondition`).
        damping: λ, or a callable of the step; with damping_mode="each" a pair (A, G) too.
        weight_decay: γ, added to the preconditioned gradient as γ · parameter.
        T: Steps between updates of the factors, or a callable of the step that returns how many
            to wait.
        T_inverse: Steps between new inverses (or eigenbases), likewise. Averages of the first
            few batches are poor: an integer has inverses at steps 1, 2, 4, 8 and so on too, until
            the interval has passed (not with `stagger`). Without new factors there is no new one.
        loss_average: What the loss averages over: "batch", "batch+sequence" or None for a sum.
        factor_decay: β of the averages A ← β A + (1 − β) Â, which are debiased.
        inverse: "eigh" keeps eigenvectors, so that damping may change at every step, and is
            needed for damping_mode="exact" and `ekfac`. "qr" has them improved by one step of
            orthogonal iteration (https://arxiv.org/abs/2409.11321), but for the first ones and
            where more than half of the averages is new; meant for small T_inverse. "cholesky" keeps
            inverses: two products with a gradient instead of four. "newton-schulz" keeps inverses
            too and improves them by matrix products alone, starting from the last ones: three
            products with T_inverse=1, by tensor cores on a GPU, where the host reads nothing; for
            damped factors whose condition number is at most 1e4. (With exponent=1/2 it starts anew,
            at 30 times three products.)
        damping_mode: "factored" adds π√λ to A and √λ/π to G, "each" λ to both, "exact" λ to
            the eigenvalues of G ⊗ A. By default "factored"; "exact" for `ekfac`.
        exponent: 1 for the natural gradient, or 1/2 for inverse square roots.
        ekfac: "exact" (or True): second moments of each example's gradient (of each call's, where
            a layer is called twice), of layers with rows (embeddings and norms keep their
            Kronecker eigenvalues). "ema": of the batch's gradient, as in Adam, in every step,
            whatever T; their scale is smaller by the batch size.
        stagger: Whether layers take turns, so that no step has all inverses to compute. Until
            its first turn, a layer's factors count as multiples of I.
        lag: Steps after which new inverses are used (a layer's first ones at once; none later than
            the next are due), computed meanwhile on a thread and a stream of their own, at twice
            the memory. Exact, as a step waits if it must. No CUDA graphs of such steps.
        structure: Of both factors, or a pair, by layer names if it is a mapping; "dense",
            "diagonal", "block30diagonal" and "auto", whose inverses have the same structure.
        max_dim: The most rows of a dense factor; larger ones are split into blocks of that size
            or become diagonal (`beyond_max_dim`), with a warning. None: no limit.
        adaptive: True, or some of "damping", "lr" and "momentum": choose them by the exact
            quadratic model of each batch's loss (https://arxiv.org/abs/1503.05671, Sections 6.4,
            6.5, 7), at the price of two forward-mode passes and a forward pass. It needs
            `curvature(outputs, loss, targets)` in each step, with what the model returned; one
            batch a step; no dropout. `damping` is where it starts. With "lr" or "momentum", an
            update that raises the batch's loss is taken back (and the damping grows), there is
            no weight decay, and `kl_clip` and schedules of `lr` do not matter.
        kl_clip: κ: shrink a group's update by min(1, √(κ / |lr² Σ ⟨update, gradient⟩|)). It is in
            units of the loss: a sum over many outputs wants a larger one, or None.
        share_inverses: How ranks share the work of inverses, by its cost. "inverses": each rank
            computes a part of them and sends it to all. "gradients": each keeps its part to itself
            (1/ranks of the memory) and sends, in each step, the preconditioned gradients of its
            layers; not with `ekfac` or `lag`. `state_dict` gathers inverses then: call it on every
            rank. False: each rank computes all. One rank alone does as ever.

    Raises:
        ValueError: If an argument is out of range, or a structure has no inverse of its kind;
            nothing is hooked then.
        TypeError: If an argument has the wrong type.
    """

    rule: ClassVar[str] = "kfac"
    factor_names: ClassVar[tuple[str, str]] = ("A", "G")
    built_in: ClassVar[tuple[str, ...]] = (
        *AdaptedOptimizer.built_in, "inverse", "ekfac", "exponent", "max_dim",
    )  # fmt: skip
    option_checks: ClassVar[dict[str, checks.Check]] = (
        AdaptedOptimizer.option_checks | OPTION_CHECKS
    )

    def __init__(
        self,
        model: nn.Module,
        params: Any = None,
        lr: float | Tensor = 1e-2,
        momentum: float = 0.9,
        damping: float | tuple[float, float] | Callable[[int], float] = 1e-2,
        weight_decay: float = 0.0,
        T: int | Callable[[int], int] = 1,
        T_inverse: int | Callable[[int], int] = 10,
        loss_average: Literal["batch", "batch+sequence"] | None = "batch",
        *,
        factor_decay: float = 0.95,
        inverse: Inverse = "eigh",
        damping_mode: Literal["factored", "each", "exact"] | None = None,
        exponent: float = 1,
        ekfac: bool | Literal["exact", "ema"] = False,
        stagger: bool = False,
        lag: int = 0,
        structure: Structures | Mapping[str, Structures] = "dense",
        max_dim: int | None = 8192,
        beyond_max_dim: Literal["blocks", "diagonal"] = "blocks",
        adaptive: bool | str | Sequence[str] = False,
        kfac_approx: Literal["expand", "reduce"] = "expand",
        fisher: Fisher = "empirical",
        norms: bool = False,
        preconditioner_dtype: Any = None,
        nesterov: bool = False,
        average_momentum: bool = False,
        decoupled_weight_decay: bool = False,
        precondition: Literal["gradient", "momentum"] = "gradient",
        graft: Literal["sgd", "adamw"] | None = None,
        update_rms: float | None = None,
        kl_clip: float | None = 1e-3,
        warmup: int = 0,
        curvature_fraction: float = 1,
        warn_unsupported: bool = True,
        fallback: Literal["sgd", "adamw"] | None = "sgd",
        fallback_lr: float | None = None,
        fallback_weight_decay: float | None = None,
        share_inverses: Literal["inverses", "gradients"] | Literal[False] = "inverses",
        process_group: Any = None,
        reduce_dtype: torch.dtype | None = None,
    ) -> None:
        checks.one_of("share_inverses", share_inverses, SHARING)
        given = dict(locals())
        apart = ("self", "model", "params", "warn_unsupported", "norms", "process_group",
                 "reduce_dtype", "share_inverses", "__class__")  # fmt: skip
        options = {key: value for key, value in given.items() if key not in apart}
        self._notice, self._adaptation = Notice(), Adaptation(model)
        self._owners = Owners(share_inverses, process_group, lambda recipe: sum(costs(recipe)))
        over = process_group if share_inverses == "inverses" else False
        self._pending = pending.Pending(self._notice, over)
        super().__init__(
            model, params, options, warn_unsupported, norms, process_group, reduce_dtype
        )
        if self._options["adaptive"]:
            self._handles += self._adaptation.attach()

    def _checked(self, options: Group) -> Group:
        return checked(super()._checked(options))

    def _check_binding(self, binding: Binding, group: Group) -> None:
        check_layer(binding, group, self.sharing)

    def _layer(self, binding: Binding, state: dict[str, Any], group: Group) -> refresh.Layer:
        recipe, names = binding.tap.recipe, (binding.site.name,)
        spaces = (recipe.input_structure, recipe.output_structure)
        return refresh.Layer(names, state, spaces, (recipe.dim_in, recipe.dim_out), id(group))

    def _new_state(self, binding: Binding, group: Group, device: torch.device) -> dict[str, Any]:
        recipe, dtypes = binding.tap.recipe, binding.dtypes
        groups = recipe.layer.groups
        ins = recipe.input_structure.coordinate_shape(recipe.dim_in)
        outs = recipe.output_structure.coordinate_shape(recipe.dim_out)
        at = next(at for at, other in enumerate(self._bindings) if other is binding)
        turn = intervals.first_turn(at, len(self._bindings), group)
        state: dict[str, Any] = {
            "A": torch.zeros(groups, *ins, dtype=dtypes[0], device=device),
            "G": torch.zeros(groups, *outs, dtype=dtypes[1], device=device),
            # One entry, for torch 2.11 takes a 0-d tensor on a CPU for constant in a compiled step.
            "weight": torch.zeros(1, dtype=dtypes[0], device=device),
            "inverted": 0,
            "refresh": turn,
            "turn": turn,
            "last_inverse": -1,
        }
        state |= self._owned_state(binding, state, group, device)
        if group["lag"]:
            state |= pending.new_state(state)
        if recipe.moments or group["ekfac"] == "ema":
            shape = (groups, recipe.dim_out, recipe.dim_in)
            state["moments"] = torch.zeros(shape, dtype=dtypes[1], device=device)
            state["moments_weight"] = torch.zeros(1, dtype=dtypes[1], device=device)
        return state

    def _fresh(
        self, binding: Binding, state: dict[str, Any], group: Group, device: torch.device
    ) -> dict[str, Any]:
        layer = self._layer(binding, state, group)
        return refresh.new_state(layer, group["inverse"], binding.dtypes, device)

    def _basis(self, binding: Binding, state: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
        if not (binding.tap.recipe.moments and state["inverted"]):
            return None
        return state["A_basis"], state["G_basis"]

    def _update_factors(
        self, state: dict[str, Any], captured: Measured, binding: Binding, group: Group
    ) -> None:
        update_averages(state, captured.factors, group["factor_decay"])
        if captured.moments is not None and state["inverted"]:
            update_moments([state], [captured.moments], group["factor_decay"])

    def _refresh(self, active: Sequence[Active]) -> None:
        """New inverses of all layers whose turn it is, together."""
        kept = [layer for layer in active if self._keeps(layer.binding)]
        waiting = [layer for layer in kept if not layer.state["inverted"]]
        self._take_in_gradients(kept)
        layers = [(self._layer(b, state, group), group) for b, group, state, _ in kept]
        self._pending.adopt([layer for layer, _ in layers])
        due = []
        for layer, group in layers:
            state = layer.state
            is_due = intervals.is_due(state, group)
            if not is_due and (state["inverted"] or not state.get("updates")):
                continue
            damping = damping_now(state, group)
            how = refresh.How(group["inverse"], group["damping_mode"], group["exponent"])
            if is_due:
                iterations = warm_iterations(intervals.new_part(state, group))
                due.append((layer, damping, how._replace(iterations=iterations), group))
            else:
                refresh.isotropic(layer, damping, how)
        self._pending.refresh(due)
        self._take_in_gradients(waiting)  # in their first bases, or rounding would decide
        for binding, group, state, _ in active:
            if not self._keeps(binding) and intervals.is_due(state, group):
                intervals.schedule(state, group)

    def state_dict(self) -> dict[str, Any]:
        """The state as plain tensors and numbers, with what is computed beside; waits for it."""
        self._pending.settle()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state; what is computed beside is dropped."""
        super().load_state_dict(state_dict)
        self._pending.discard()

    def close(self) -> None:
        """Remove every hook and end the thread; the optimizer must not be used afterwards."""
        super().close()
        self._pending.close()

    def _precondition(
        self, state: dict[str, Any], matrix: Tensor, recipe: Recipe, group: Group
    ) -> Tensor:
        if not state.get("updates"):
            return matrix
        spaces = (recipe.input_structure, recipe.output_structure)
        if group["inverse"] not in EIGEN:
            return by_inverses(state, matrix, spaces)
        return self._in_eigenbasis([Turned(state, matrix, spaces)], group)[0]

    def _precondition_all(
        self, layers: Sequence[Active], matrices: Sequence[Tensor]
    ) -> list[Tensor]:
        _, group, state, _ = layers[0]
        if not state.get("updates") or group["inverse"] not in EIGEN:
            return super()._precondition_all(layers, matrices)
        recipes = [layer.binding.tap.recipe for layer in layers]
        parts = [
            Turned(layer.state, matrix, (recipe.input_structure, recipe.output_structure))
            for layer, matrix, recipe in zip(layers, matrices, recipes, strict=True)
        ]
        return self._in_eigenbasis(parts, group)

    @staticmethod
    def _in_eigenbasis(parts: Sequence[Turned], group: Group) -> list[Tensor]:
        """Of layers of one group, at one step of theirs."""
        damping = damping_now(parts[0].state, group)
        return in_eigenbasis(parts, group["damping_mode"], damping, group["exponent"])
