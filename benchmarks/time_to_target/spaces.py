"""Search spaces: as many dimensions, each as wide, for every optimizer.

Each has the learning rate (three decades), weight decay (three decades), one number of its own
(two decades), and the horizon: the step, as a share of the budget, at which the rate reaches zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

HORIZON = (0.4, 1.0)
REFERENCE_HORIZON = 0.75
"""At which targets are set and defaults are run, as AlgoPerf's "step hint" is of its time limit."""
DECADES = {"lr": 3, "weight_decay": 3, "own": 2}

Params = Mapping[str, float]


@dataclass(frozen=True)
class Space:
    """The least values; how wide a dimension is, `DECADES` says.

    `own` names an option; "1-momentum" and "1-beta1" are searched as distances from 1.
    """

    lr: float
    weight_decay: float
    own: str
    own_least: float

    def ranges(self) -> dict[str, tuple[float, float]]:
        """Least and largest of what is searched on a logarithmic scale."""
        least = {"lr": self.lr, "weight_decay": self.weight_decay, "own": self.own_least}
        return {key: (low, low * 10 ** DECADES[key]) for key, low in least.items()}

    def options(self, params: Params) -> dict[str, Any]:
        """An optimizer's keyword arguments."""
        own = params["own"]
        chosen: dict[str, Any] = {"lr": params["lr"], "weight_decay": params["weight_decay"]}
        match self.own:
            case "1-momentum":
                chosen["momentum"] = 1 - own
            case "1-beta1":
                chosen["beta1"] = 1 - own
            case name:
                chosen[name] = own
        return chosen


SGD = Space(1e-3, 1e-6, "1-momentum", 5e-3)
ADAM = Space(1e-4, 1e-3, "1-beta1", 5e-3)
MUON = Space(1e-4, 1e-3, "1-momentum", 5e-3)
CURVATURE = Space(3e-4, 1e-6, "damping", 1e-4)
KFAC = Space(3e-4, 1e-6, "damping", 1e-3)
GRAFTED = Space(1e-4, 1e-5, "damping", 1e-4)
"""Of curvature whose updates have a length that AdamW's rates suit."""
LENGTHENED = Space(1e-4, 1e-3, "damping", 1e-4)
"""Of curvature whose updates are as long as AdamW's, and whose weights decay as AdamW's do."""
