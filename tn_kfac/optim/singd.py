"""SINGD: structured inverse-free natural gradient descent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from tn_kfac.curvature import Measured, Recipe
from tn_kfac.curvature.statistics import Fisher
from tn_kfac.optim import checks
from tn_kfac.optim.binding import Binding
from tn_kfac.optim.factor_update import (
    Steps,
    initial_factors,
    measured,
    riemannian_gradient,
    update_factor,
)
from tn_kfac.optim.fused import Fused
from tn_kfac.optim.fused_optimizer import FusedOptimizer
from tn_kfac.optim.groups import Group
from tn_kfac.optim.owners import Owners
from tn_kfac.optim.shared_updates import SHARING, check_owned, price
from tn_kfac.structures import Spec

StructureLike = str | Spec
Structures = StructureLike | tuple[StructureLike, StructureLike]


def _given(
    structure: Structures | Mapping[str, Structures] | None,
    structures: tuple[StructureLike, StructureLike] | None,
) -> Structures | Mapping[str, Structures]:
    """The structure under either of its names, diagonal if there is none.

    Raises:
        ValueError: If both are given.
    """
    if structure is not None and structures is not None:
        raise ValueError(f"structure={structure!r} and structures={structures!r}: give one")
    if structure is not None:
        return structure
    return "diagonal" if structures is None else structures


def _alpha(group: Group) -> float:
    """The Riemannian momentum of a group's factors."""
    return 0.0 if group["kfac_like"] else group["alpha1"]


class SINGD(FusedOptimizer):
    r"""Structured inverse-free natural gradient descent, with a fallback for all the rest.

    The gradient G of each layer's weight (with its bias as an extra column) is replaced by
    C Cᵀ G K Kᵀ, where K Kᵀ and C Cᵀ approximate the inverses of the layer's Kronecker
    factors (empirical Fisher). K and C stay in a structured matrix space and are updated
    without inversion (https://arxiv.org/abs/2312.05705, Figure 4). Grouped convolutions have one
    exact pair of factors per channel group, each with its own traces.

    By default G is the gradients' momentum, Nesterov's, factors are new in every step, and each
    layer's update gets a root mean square of 0.2 lr, whatever the gradients' size. The published
    method differs in these options, in its dense structure, and has no `factor_clip` (None):

    >>> SINGD(model, lr=1e-3, T=10, lr_cov=1e-2, update_rms=None, precondition="gradient",
    ...       nesterov=False, fallback="sgd")

    With `momentum` and `weight_decay` as in `torch.optim.SGD`, it is that of the package `singd`.

    Parameters without Kronecker factors (norm layers, stray parameters) are
    trained by `fallback`, in param groups of their own (`group["rule"]`).

    Args:
        model: The network that is trained.
        params: Parameters, or groups of them, with options of their own; all parameters
            of the model if None. Weight and bias of a layer may be in groups that differ
            in lr, momentum and weight decay.
        lr: Learning rate (β₂ in the paper). With `update_rms`, in which no gradient's size counts,
            it is that of steps as long as AdamW's, and does for the fallback too; without, steps
            are as long as gradients and curvature make them.
        momentum: Of the parameter update (α₂); of the fallback "adamw" it is β₁.
        damping: λ, added to the curvature.
        alpha1: Riemannian momentum of the factor updates (α₁); 0 if `kfac_like`.
        weight_decay: γ, added to the preconditioned gradient as γ · parameter.
        T: Steps between factor updates, or a callable of the step that returns how many to wait.
            Diagonal factors cost little in every step; of other structures T=10 is advisable.
        loss_average: What the loss averages over: "batch", "batch+sequence" (also over
            shared positions: the tokens of a sequence) or None for a sum. It must fit the
            loss; class weights and ignored targets want fisher="mc" or "type-2".
        lr_cov: Step size of the factor updates (β₁), or a callable of the step: how fast factors
            follow the curvature.
        structure: Of both factors, or a pair (input, output): a name ("diagonal", "dense",
            "auto", "block30diagonal", "hierarchical15_15", "triltoeplitz", "triutoeplitz",
            "triltopleftdiag" and its three kin) or an object of `tn_kfac.structures`; or a
            mapping from patterns of layer names, as in {"head": "dense", "*": "diagonal"}.
        fisher: "empirical" takes the gradients of the loss; "mc" those for labels drawn from
            the model, and "type-2" the exact Hessian of the loss in the outputs: both need a
            call of `curvature` before each backward pass. "forward-only" sets G to I.
        norms: Whether the affine parameters of normalisation layers get factors (the exact
            diagonal of the Fisher, at the price of one more pass over their inputs) or are
            trained by the fallback.
        structures: `structure` under the name that the package `singd` uses.
        kfac_approx: "expand" or "reduce" (https://arxiv.org/abs/2311.00636).
        warn_unsupported: Whether to warn of parameters that are not trained, or that
            share weights in a way without Kronecker factors.
        kfac_like: IKFAC, whose K Kᵀ tracks the inverse of one damped factor alone.
        preconditioner_dtype: Of K and C, or a pair; None means the parameter's dtype, but
            at least float32.
        init_grad_scale: Accepted for scripts written for `singd`; it has no effect, since
            loss scaling is undone exactly.
        normalize_lr_cov: Divide `lr_cov` by max(1, max|m|).
        nesterov: Nesterov's momentum, as in `torch.optim.SGD`, instead of the heavy ball's.
        average_momentum: Momentum is an average, b ← momentum · b + (1 − momentum) g from 0, as
            in Adam, instead of a sum: so a rate does not depend on it.
        decoupled_weight_decay: Shrink parameters by 1 − lr · weight_decay before the step, as in
            AdamW, instead of adding the decay to the direction.
        precondition: The "momentum" of gradients, so that all of it has the newest factors and
            weight decay is no part of it; or the "gradient", whose momentum is taken afterwards.
        exponent: 1, or 1/2 for A^-1/2 and G^-1/2 (diagonal factors only).
        graft: Take the length of each layer's update from "sgd" (the gradient's norm) or "adamw"
            (the norm of g / (√v̂ + ε); momentum then averages), so that a learning rate tuned
            for it carries over (https://arxiv.org/abs/2002.11803).
        update_rms: Or give each layer's update this root mean square, times lr. AdamW's falls from
            1 to about 0.2, so rates of its long runs carry over, and short ones want larger rates.
            None: what preconditioning makes of it.
        kl_clip: κ: shrink a group's update by min(1, √(κ / |lr² Σ ⟨update, gradient⟩|)).
        warmup: First steps, in which factors form but gradients are followed as they are.
        init: Factors start at the "identity", or at the first batch's "curvature".
        factor_clip: The most that lr_cov times the norm of a factor's momentum may grow to (below
            1, no curvature turns a factor around); None: anything, as the package does.
        curvature_fraction: 1/n: measure every n-th sample of a batch, in turns; unbiased.
        fallback: "adamw", "sgd", or None to leave these parameters untrained.
        fallback_lr: Learning rate of the fallback; `lr` if None.
        fallback_weight_decay: Weight decay of the fallback; `weight_decay` if None.
        share_updates: "factors": each of several ranks updates the factors of some layers, by what
            that costs, and sends them to all. "gradients": it keeps them to itself (1/ranks of the
            memory) and sends, in each step, the preconditioned gradients of its layers; for dense
            factors alone, and `state_dict` gathers them: call it on every rank. False: each rank
            updates all. The steps are the same; diagonal factors are everybody's as ever.
        process_group: Whose ranks see parts of one batch: curvature is summed over them. All
            processes if None; False if each trains on its own.
        reduce_dtype: In which it is sent and summed; None: its own. torch.bfloat16 halves the
            messages of float32 and rounds each sum to 8 bits; counts of samples stay exact.

    Raises:
        ValueError: If an argument is out of range; nothing is hooked then.
        TypeError: If an argument has the wrong type.
    """

    rule: ClassVar[str] = "singd"
    factor_names: ClassVar[tuple[str, str]] = ("K", "C")
    option_checks: ClassVar[dict[str, checks.Check]] = FusedOptimizer.option_checks | {
        "damping": checks.number,
        "alpha1": lambda name, value: checks.number(name, value, below=1.0),
        "lr_cov": checks.schedule,
        "kfac_like": checks.flag,
        "normalize_lr_cov": checks.flag,
        "init": lambda n, v: checks.one_of(n, v, ("identity", "curvature")),
        "factor_clip": checks.optional,
    }

    def __init__(
        self,
        model: nn.Module,
        params: Any = None,
        lr: float | Tensor = 1e-2,
        momentum: float = 0.9,
        damping: float = 1e-3,
        alpha1: float = 0.5,
        weight_decay: float = 0.0,
        T: int | Callable[[int], int] = 1,
        loss_average: Literal["batch", "batch+sequence"] | None = "batch",
        lr_cov: float | Callable[[int], float] = 0.1,
        structure: Structures | Mapping[str, Structures] | None = None,
        kfac_approx: Literal["expand", "reduce"] = "expand",
        warn_unsupported: bool = True,
        kfac_like: bool = False,
        preconditioner_dtype: Any = None,
        init_grad_scale: float = 1.0,
        normalize_lr_cov: bool = False,
        *,
        fisher: Fisher = "empirical",
        norms: bool = False,
        structures: tuple[StructureLike, StructureLike] | None = None,
        nesterov: bool = True,
        average_momentum: bool = False,
        decoupled_weight_decay: bool = False,
        precondition: Literal["gradient", "momentum"] = "momentum",
        exponent: float = 1,
        graft: Literal["sgd", "adamw"] | None = None,
        update_rms: float | None = 0.2,
        kl_clip: float | None = None,
        warmup: int = 0,
        init: Literal["identity", "curvature"] = "identity",
        factor_clip: float | None = 0.9,
        curvature_fraction: float = 1,
        fallback: Literal["sgd", "adamw"] | None = "adamw",
        fallback_lr: float | None = None,
        fallback_weight_decay: float | None = None,
        share_updates: Literal["factors", "gradients"] | Literal[False] = "factors",
        process_group: Any = None,
        reduce_dtype: torch.dtype | None = None,
    ) -> None:
        checks.number("init_grad_scale", init_grad_scale)
        checks.one_of("share_updates", share_updates, SHARING)
        apart = {"self", "model", "params", "warn_unsupported", "norms", "process_group", "apart",
                 "reduce_dtype", "share_updates", "structures", "init_grad_scale"}  # fmt: skip
        given = dict(locals()).items()
        options = {key: value for key, value in given if key not in apart and key != "__class__"}
        options["structure"] = _given(structure, structures)
        self._fused = Fused()
        self._owners = Owners(share_updates, process_group, price)
        super().__init__(
            model, params, options, warn_unsupported, norms, process_group, reduce_dtype
        )

    def _new_state(self, binding: Binding, group: Group, device: torch.device) -> dict[str, Any]:
        return self._owned_state(binding, {}, group, device)

    def _fresh(
        self, binding: Binding, state: dict[str, Any], group: Group, device: torch.device
    ) -> dict[str, Any]:
        recipe, dtypes = binding.tap.recipe, binding.dtypes
        groups = recipe.layer.groups
        K = recipe.input_structure.eye(groups, recipe.dim_in, dtypes[0], device)
        C = recipe.output_structure.eye(groups, recipe.dim_out, dtypes[1], device)
        return {"K": K, "C": C, "m_K": torch.zeros_like(K), "m_C": torch.zeros_like(C)}

    def _basis(self, binding: Binding, state: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
        return (state["K"], state["C"]) if "K" in state else None

    def _check_binding(self, binding: Binding, group: Group) -> None:
        check_owned(binding, self.sharing)
        recipe = binding.tap.recipe
        spaces = (recipe.input_structure, recipe.output_structure)
        if group["exponent"] != 1 and any(space.reads != "diagonal" for space in spaces):
            names = tuple(space.name for space in spaces)
            raise ValueError(
                f"exponent={group['exponent']} needs diagonal factors, layer "
                f"{binding.site.name!r} has {names}: choose structure='diagonal' or exponent=1"
            )

    def _update_factors(
        self, state: dict[str, Any], captured: Measured, binding: Binding, group: Group
    ) -> None:
        K, C, recipe = state["K"], state["C"], binding.tap.recipe
        A, G = captured.factors.A.to(K.dtype), captured.factors.G.to(C.dtype)
        sides = {
            "K": measured(recipe.input_structure, K, A, recipe.dim_in),
            "C": measured(recipe.output_structure, C, G, recipe.dim_out),
        }
        ikfac = group["kfac_like"]
        if group["init"] == "curvature" and not state.get("started"):
            for factor, start in zip(
                (K, C),
                initial_factors(sides["K"], sides["C"], group["damping"], ikfac),
                strict=True,
            ):
                factor.copy_(start)
            return
        alpha = _alpha(group)
        steps = Steps(
            alpha, self._beta(state, group), group["normalize_lr_cov"], group["factor_clip"]
        )
        for name, other in (("K", "C"), ("C", "K")):
            own = sides[name]
            gradient = riemannian_gradient(own, sides[other], group["damping"], ikfac)
            factor, m = update_factor(own, state.get(f"m_{name}"), gradient, steps)
            state[name].copy_(factor)
            if alpha:
                state[f"m_{name}"].copy_(m)

    def _count_update(self, state: dict[str, Any], group: Group) -> None:
        super()._count_update(state, group)
        if group["init"] == "curvature":
            state["started"] = True

    def _updated(self, state: dict[str, Any], group: Group) -> list[Tensor]:
        keys = ("K", "C", "m_K", "m_C") if _alpha(group) else ("K", "C")
        return [state[key] for key in keys]

    def _beta(self, state: dict[str, Any], group: Group) -> float:
        lr_cov: float | Callable[[int], float] = group["lr_cov"]
        beta = lr_cov(state["step"]) if callable(lr_cov) else lr_cov
        checks.number("lr_cov", beta)
        return beta

    def _precondition(
        self, state: dict[str, Any], matrix: Tensor, recipe: Recipe, group: Group
    ) -> Tensor:
        """C Cᵀ · matrix · K Kᵀ, or |C| · matrix · |K| for exponent 1/2."""
        K, C = state["K"], state["C"]
        ins, outs = recipe.input_structure, recipe.output_structure
        columns = matrix.mT.to(K.dtype)
        if group["exponent"] != 1:
            return outs.apply(C.abs(), ins.apply(K.abs(), columns).mT.to(C.dtype))
        matrix = ins.apply(K, ins.apply_transposed(K, columns)).mT.to(C.dtype)
        return outs.apply(C, outs.apply_transposed(C, matrix))
