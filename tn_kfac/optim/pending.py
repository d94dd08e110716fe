"""Inverses that are computed beside the training, and used some steps later.

What is pending is in a layer's state: `adopt`, the step from which it is used (-1: nothing is
pending), and, once somebody asked for it, the tensors under the names of `BESIDE`. So it can be
saved at any step, and a resumed run goes on with the same bits. A compiled step computes it on
the spot, and uses it as late.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tn_kfac.optim.beside import Beside, Job
from tn_kfac.optim.damping import Damping
from tn_kfac.optim.groups import Group
from tn_kfac.optim.intervals import NOTHING, first_use, is_pending, schedule
from tn_kfac.optim.notice import Notice
from tn_kfac.optim.refresh import (
    Found,
    How,
    Layer,
    Task,
    adopt,
    decompose,
    hand_out,
    inverse_keys,
    tasks,
)
from tn_kfac.optim.shared_inverses import refresh

State = dict[str, Any]
BESIDE = "next_"


def new_state(state: State) -> State:
    """What a layer's state holds when nothing is pending; the tensors are not read then."""
    later = {BESIDE + key: torch.zeros_like(state[key]) for key in inverse_keys(state)}
    return {"adopt": NOTHING} | later


@dataclass(eq=False)
class _Begun:
    task: Task
    job: Job[Found]


class Pending:
    """New inverses, at once or beside the training: what was begun and nobody asked for yet.

    Those at once are shared out over the ranks of `group`, unless it is False.
    """

    def __init__(self, notice: Notice, group: Any) -> None:
        self._notice, self._group, self._beside = notice, group, Beside()
        self._begun: list[_Begun] = []

    def refresh(self, due: Sequence[tuple[Layer, Damping, How, Group]]) -> None:
        """New inverses of these layers, and when they have the next."""
        now, later = [], []
        for entry in due:
            (later if entry[-1]["lag"] and entry[0].state["inverted"] else now).append(entry)
        refresh([entry[:-1] for entry in now], self._notice, self._group)
        self._begin([entry[:-1] for entry in later])
        for layer, _, _, group in now:
            schedule(layer.state, group)
        for layer, _, _, group in later:
            schedule(layer.state, group)
            layer.state["adopt"] = first_use(layer.state, group)

    def _begin(self, due: Sequence[tuple[Layer, Damping, How]]) -> None:
        """Begin to decompose the factors as they are now."""
        for task in tasks(due):
            if torch.compiler.is_compiling():
                hand_out(task, decompose(task.requests, task.how), self._notice, _keep)
                continue
            inputs = [matrix for request in task.requests for matrix in request.matrices]
            _check_eager(inputs)
            work = partial(decompose, task.requests, task.how)
            self._begun.append(_Begun(task, self._beside.start(work, inputs)))

    def adopt(self, layers: Sequence[Layer]) -> None:
        """Use what is due, of layers whose step has come; waits for it."""
        for layer in layers:
            state = layer.state
            if is_pending(state) and state["adopt"] <= state["step"]:
                if not torch.compiler.is_compiling():
                    _check_eager([state["weight"]])
                if self._begun:
                    self._settle(state)
                adopt(layer, {key: state[BESIDE + key] for key in inverse_keys(state)})
                state["adopt"] = NOTHING

    def settle(self) -> None:
        """Wait for all that is pending; then it is in the states."""
        self._settle(None)

    def _settle(self, state: State | None) -> None:
        """Wait for what is pending for the layer with this state; None: for all."""
        for begun in list(self._begun):
            layers = begun.task.layers
            if state is None or any(layer.state is state for layer in layers):
                try:
                    found = begun.job.result()
                except Exception:  # which the caller sees; its layers keep their last inverses
                    self._begun.remove(begun)
                    for layer in layers:
                        layer.state["adopt"] = NOTHING
                    raise
                self._begun.remove(begun)
                hand_out(begun.task, found, self._notice, _keep)

    def discard(self) -> None:
        """Forget what was begun."""
        self._begun.clear()

    def close(self) -> None:
        """End the thread."""
        self._beside.close()


def _keep(layer: Layer, new: Mapping[str, Tensor]) -> None:
    """Write a layer's new tensors beside those in use."""
    if BESIDE + next(iter(new)) not in layer.state:  # lag was 0
        layer.state.update(new_state(layer.state) | layer.state)
    for key, tensor in new.items():
        layer.state[BESIDE + key].copy_(tensor)


def _check_eager(tensors: Sequence[Tensor]) -> None:
    """Refuse CUDA graphs: their replays count no steps, so nothing would be used in time.

    Raises:
        RuntimeError: If one is being captured.
    """
    if tensors[0].is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "inverses that are used `lag` steps later cannot be part of a CUDA graph, whose "
            "replays count no steps: choose lag=0, or capture the forward and backward pass alone"
        )
