"""An optimizer whose hyper-parameters may be chosen by a quadratic model of each batch's loss."""

from __future__ import annotations

from torch import Tensor, nn

from tn_kfac.curvature.likelihood import loss_module
from tn_kfac.optim import adaptive as adapting
from tn_kfac.optim.alike import AlikeOptimizer
from tn_kfac.optim.groups import Group
from tn_kfac.optim.ranks import ranks_of


class AdaptedOptimizer(AlikeOptimizer):
    """An optimizer with the option `adaptive`: what its steps do about it."""

    _adaptation: adapting.Adaptation

    def _note(self, outputs: Tensor, loss: str | nn.Module, targets: Tensor | None) -> None:
        if self._options["adaptive"]:
            self._adaptation.note(outputs, loss_module(loss), targets)

    def add_param_group(self, param_group: Group) -> None:
        wanted = self._options["adaptive"]
        if isinstance(param_group, dict) and param_group.get("adaptive", wanted) != wanted:
            raise ValueError(
                f"adaptive={param_group['adaptive']!r} of a group: it is one choice for all of "
                "them, an argument of KFAC"
            )
        super().add_param_group(param_group)

    def _clear(self) -> None:
        super()._clear()
        self._adaptation.clear()

    def _check_step(self) -> None:
        if self._options["adaptive"]:
            self._adaptation.batch()
            if ranks_of(self._process_group) > 1:
                raise RuntimeError("adaptive hyper-parameters know one process alone: leave it out")

    def _write_all(self, directions: dict[Tensor, Tensor]) -> None:
        wanted = self._options["adaptive"]
        own = [group for group in self.param_groups if group["rule"] == self.rule]
        if not wanted or not directions:
            super()._write_all(directions)
        elif wanted != ("damping",):
            adapting.move(self._adaptation, own, directions, self.state, wanted)
            for group in self.param_groups:
                if group["rule"] != self.rule:
                    self._write(group, directions)
        elif adapting.is_time(self.state[next(iter(directions))], wanted):
            before = {p: p.detach().clone() for p in directions}
            gradients = {p: p.grad for p in directions if p.grad is not None}
            super()._write_all(directions)
            adapting.follow(self._adaptation, own, before, gradients)
        else:
            super()._write_all(directions)
