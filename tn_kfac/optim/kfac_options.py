"""KFAC's options: what fits together, and which factors `max_dim` splits."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor

from tn_kfac.curvature import Recipe
from tn_kfac.optim import checks
from tn_kfac.optim.adaptive import ADAPTIVE
from tn_kfac.optim.binding import Binding
from tn_kfac.optim.damping import Damping
from tn_kfac.optim.groups import Group
from tn_kfac.optim.inverses import EIGEN
from tn_kfac.structures import Dense, Limited, Structure


def checked(options: Group) -> Group:
    """Options that each are in range, after a check of how they fit together.

    Raises:
        ValueError: If they do not.
    """
    ekfac = "exact" if options["ekfac"] is True else options["ekfac"]
    mode = options["damping_mode"] or ("exact" if ekfac else "factored")
    adaptive = adaptive_names(options["adaptive"])
    options = options | {"ekfac": ekfac, "damping_mode": mode, "adaptive": adaptive}
    if "lr" in adaptive or "momentum" in adaptive:
        options["kl_clip"] = None
    for wrong, why in _conflicts(options):
        if wrong:
            raise ValueError(why)
    most, beyond = options["max_dim"], options["beyond_max_dim"]
    if most is not None:
        options["structure"] = _limit(options["structure"], Limited(most, beyond).name)
    return options


SHARING = (False, "inverses", "gradients")
"""What ranks send each other: nothing, inverses, or preconditioned gradients."""

OPTION_CHECKS: dict[str, checks.Check] = {
    "damping": checks.damping,
    "T_inverse": checks.intervals,
    "lag": lambda name, value: checks.interval(name, value, least=0),
    "factor_decay": lambda name, value: checks.number(name, value, below=1.0),
    "inverse": lambda n, v: checks.one_of(n, v, ("eigh", "qr", "cholesky", "newton-schulz")),
    "damping_mode": lambda n, v: checks.one_of(n, v, (None, "factored", "each", "exact")),
    "ekfac": lambda n, v: checks.one_of(n, v, (False, True, "exact", "ema")),
    "stagger": checks.flag,
    "max_dim": checks.optional_interval,
    "adaptive": lambda name, value: adaptive_names(value),
    "beyond_max_dim": lambda n, v: checks.one_of(n, v, ("blocks", "diagonal")),
}


def adaptive_names(value: Any) -> tuple[str, ...]:
    """Which hyper-parameters are adaptive.

    Raises:
        ValueError: If there is no such one.
    """
    names = ADAPTIVE if value is True else () if value is False else value
    names = (names,) if isinstance(names, str) else names
    if not isinstance(names, (tuple, list)) or not set(names) <= set(ADAPTIVE):
        raise ValueError(f"adaptive must be True, False or some of {list(ADAPTIVE)}, got {value!r}")
    return tuple(names)


def _conflicts(options: Group) -> list[tuple[bool, str]]:
    inverse, mode, ekfac = options["inverse"], options["damping_mode"], options["ekfac"]
    pair, interval = isinstance(options["damping"], (tuple, list)), options["T_inverse"]
    return [
        (
            mode == "exact" and inverse not in EIGEN,
            f"damping_mode='exact' (of ekfac={ekfac!r}) needs eigenvalues, got "
            f"inverse={inverse!r}: choose inverse='eigh' or 'qr'",
        ),
        (
            bool(ekfac) and mode != "exact",
            f"ekfac={ekfac!r} has no factors to damp, got damping_mode={mode!r}: leave it out",
        ),
        (
            ekfac == "exact" and options["fisher"] == "forward-only",
            "ekfac='exact' needs gradients, which fisher='forward-only' has none of: choose "
            "ekfac='ema'",
        ),
        (
            inverse == "cholesky" and options["exponent"] != 1,
            f"exponent={options['exponent']} needs symmetric roots, which inverse='cholesky' has "
            "not: choose 'eigh' or 'newton-schulz'",
        ),
        (
            pair and mode != "each",
            f"damping={options['damping']!r} is a pair (A, G), which damping_mode={mode!r} cannot "
            "use: give one number, or damping_mode='each'",
        ),
        *_of_adaptive(options),
        (
            options["stagger"] and callable(options["T_inverse"]),
            "stagger=True needs T_inverse as an integer, got a callable: it can stagger itself",
        ),
        (
            isinstance(interval, int) and options["lag"] >= interval,
            f"lag={options['lag']} must be less than T_inverse={interval}, when the next inverses "
            "are computed: choose a smaller lag, or lag=0",
        ),
    ]


def _of_adaptive(options: Group) -> list[tuple[bool, str]]:
    names, damping = options["adaptive"], options["damping"]
    moves = "lr" in names or "momentum" in names
    number = isinstance(damping, (int, float, Tensor))
    lengths = ("nesterov", "average_momentum", "graft", "update_rms")
    return [
        (
            bool(names) and not number,
            f"adaptive={names!r} needs one number to start from, got damping={damping!r}",
        ),
        *(
            (
                moves and bool(options[key]),
                f"adaptive={names!r} sets the length of updates, and so would {key}="
                f"{options[key]!r}: leave it out",
            )
            for key in lengths
        ),
        (
            moves and options["precondition"] == "momentum",
            f"adaptive={names!r} has a momentum of its own: leave out precondition='momentum'",
        ),
        (
            moves and bool(options["weight_decay"]),
            f"adaptive={names!r} models the loss, without weight_decay="
            f"{options['weight_decay']!r}: leave it out",
        ),
    ]


def damping_now(state: dict[str, Any], group: Group) -> Damping:
    """A layer's damping in this step."""
    damping: Damping | Callable[[int], float] = group["damping"]
    if isinstance(damping, list):  # as YAML has it
        return damping[0], damping[1]
    if not callable(damping):
        return damping
    value: float = damping(state["step"])
    checks.number("damping(step)", value)
    return value


def _limit(chosen: Any, name: str) -> Any:
    """The same names of structures, but `name` for "dense"."""
    if isinstance(chosen, dict):
        return {pattern: _limit(pair, name) for pattern, pair in chosen.items()}
    return tuple(name if side == "dense" else side for side in chosen)


def check_layer(binding: Binding, group: Group, sharing: Any) -> None:
    """Check that a layer can be inverted, by one rank alone if it shall; warn of what is split.

    Raises:
        ValueError: If its factors have no inverses of their kind, or all ranks need them.
    """
    _check_owned(binding, group, sharing)
    recipe = binding.tap.recipe
    for space in (recipe.input_structure, recipe.output_structure):
        if not space.invertible:
            raise ValueError(
                f"structure={space.name!r} of layer {binding.site.name!r}: inverses have "
                "another structure. Choose 'dense', 'diagonal' or blocks, or SINGD"
            )
    for side, dim in zip(_limited(recipe), (recipe.dim_in, recipe.dim_out), strict=True):
        if side is not None:
            warnings.warn(
                f"layer {binding.site.name!r} has a factor of {dim} rows, more than "
                f"max_dim={group['max_dim']}: it is {side.name}. Choose another max_dim (None: "
                "no limit), or a structure for this layer",
                stacklevel=6,
            )


def _check_owned(binding: Binding, group: Group, sharing: Any) -> None:
    for key in ("ekfac", "lag"):
        if sharing == "gradients" and group[key]:
            raise ValueError(
                f"share_inverses='gradients' keeps the inverses of layer {binding.site.name!r} "
                f"on one rank, but {key}={group[key]!r} needs them on all: choose "
                "share_inverses='inverses'"
            )


def _limited(recipe: Recipe) -> tuple[Structure | None, Structure | None]:
    """The structures of A and G where they are not dense for their size alone."""
    pairs = (
        (recipe.structures[0], recipe.input_structure),
        (recipe.structures[1], recipe.output_structure),
    )
    first, second = (
        space if isinstance(spec, Limited) and not isinstance(space, Dense) else None
        for spec, space in pairs
    )
    return (None if recipe.layer.diagonal_input else first), second
