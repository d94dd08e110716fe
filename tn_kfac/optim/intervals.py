"""When a layer's inverse is computed anew, and how much of its averages is new then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tn_kfac.optim import checks
from tn_kfac.optim.groups import Group

State = dict[str, Any]


def first_turn(at: int, layers: int, group: Group) -> int:
    """The step at which a layer, the `at`-th of all, has its first inverse."""
    return at * group["T_inverse"] // layers if group["stagger"] else 0


def is_due(state: State) -> bool:
    """Whether its turn has come, and there is anything new; if not, what is due stays due."""
    updates = state.get("updates", 0)
    return updates > state["inverted"] and state["step"] >= state["refresh"]


def schedule(state: State, group: Group) -> None:
    """Note that a layer's inverse is computed now, and when it is due next.

    Not staggered, an integer has inverses at the steps 1, 2, 4, ... too, until the first interval
    has passed.
    """
    T: int | Callable[[int], int] = group["T_inverse"]
    step: int = state["step"]
    if not isinstance(T, int):
        wait = T(step)
        checks.interval("T_inverse(step)", wait)
    elif group["stagger"]:
        wait = T - (step - state["turn"]) % T
    else:
        wait = min(T - step % T, max(step, 1))
    state["refresh"] = step + wait
    state["inverted"] = state["updates"]


def new_part(state: State, group: Group) -> float | None:
    """How much of the averages came after the last inverse; None: there is none."""
    if not state["inverted"]:
        return None
    decay, updates, before = group["factor_decay"], state["updates"], state["inverted"]
    return 1.0 - decay ** (updates - before) * (1.0 - decay**before) / (1.0 - decay**updates)
