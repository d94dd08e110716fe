"""When a layer's inverse is computed anew, and how much of its averages is new then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tn_kfac.optim import checks
from tn_kfac.optim.groups import Group

State = dict[str, Any]
NOTHING = -1
"""In place of the step from which an inverse is used, if a layer waits for none."""


def first_turn(at: int, layers: int, group: Group) -> int:
    """The step at which a layer, the `at`-th of all, has its first inverse."""
    return at * group["T_inverse"] // layers if group["stagger"] else 0


def is_due(state: State, group: Group) -> bool:
    """Whether its turn has come, and there is anything new; if not, what is due stays due.

    So it does while a layer still waits for its last inverse.
    """
    if is_pending(state):
        return False
    return state.get("updates", 0) > state["inverted"] and state["step"] >= _next(state, group)


def is_pending(state: State) -> bool:
    """Whether a layer waits for an inverse that is computed beside the training."""
    return state.get("adopt", NOTHING) != NOTHING


def first_use(state: State, group: Group) -> int:
    """From which step the inverse is used that was just scheduled: at the latest with the next."""
    return min(state["step"] + group["lag"], _next(state, group))


def _next(state: State, group: Group) -> int:
    """The step of the next inverse.

    Not staggered, an integer has inverses at the steps 1, 2, 4, ... too, until the first interval
    has passed.
    """
    T: int | Callable[[int], int] = group["T_inverse"]
    last: int = state["last_inverse"]
    if last < 0 or not isinstance(T, int):
        return state["refresh"]
    if group["stagger"]:
        return last + T - (last - state["turn"]) % T
    return last + min(T - last % T, max(last, 1))


def schedule(state: State, group: Group) -> None:
    """Note that a layer's inverse was computed, and when a callable has it computed next."""
    T: int | Callable[[int], int] = group["T_inverse"]
    step: int = state["step"]
    if not isinstance(T, int):
        wait = T(step)
        checks.interval("T_inverse(step)", wait)
        state["refresh"] = step + wait
    state["last_inverse"] = step
    state["inverted"] = state["updates"]


def new_part(state: State, group: Group) -> float | None:
    """How much of the averages came after the last inverse; None: there is none."""
    if not state["inverted"]:
        return None
    decay, updates, before = group["factor_decay"], state["updates"], state["inverted"]
    return 1.0 - decay ** (updates - before) * (1.0 - decay**before) / (1.0 - decay**updates)
