"""The learning rate as a function of the step."""

import math
from dataclasses import dataclass, field
from typing import Literal

from training.types import NonNegativeFloat, NonNegativeInt, PositiveFloat


@dataclass(frozen=True)
class Schedule:
    """A factor of the learning rate, by step: a linear rise, then what `name` says.

    Args:
        name: "cosine" falls to `final`; "step" is multiplied by `gamma` at each milestone;
            "constant" stays.
        warmup_steps: Steps of the linear rise.
        warmup_fraction: The same as a share of all steps; added to `warmup_steps`.
        milestones: Of "step", as shares of all steps.
        gamma: Of "step".
        final: Of "cosine", as a share of the peak.
    """

    name: Literal["cosine", "step", "constant"] = "cosine"
    warmup_steps: NonNegativeInt = 0
    warmup_fraction: NonNegativeFloat = 0.0
    milestones: list[float] = field(default_factory=lambda: [1 / 3, 2 / 3, 8 / 9])
    gamma: PositiveFloat = 0.1
    final: NonNegativeFloat = 0.0

    def __post_init__(self) -> None:
        if self.warmup_fraction >= 1:
            raise ValueError(
                f"schedule.warmup_fraction: {self.warmup_fraction} leaves no step; take less than 1"
            )
        if not all(0 < share < 1 for share in self.milestones):
            raise ValueError(
                f"schedule.milestones: {self.milestones} are shares of all steps, between 0 and 1"
            )

    def factor(self, step: int, steps: int) -> float:
        """The factor at `step`, counted from 0, of `steps`."""
        warmup = self.warmup_steps + round(self.warmup_fraction * steps)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if self.name == "cosine":
            done = min(1.0, (step - warmup) / max(1, steps - warmup))
            return self.final + (1 - self.final) * (1 + math.cos(math.pi * done)) / 2
        if self.name == "step":
            return self.gamma ** sum(step >= share * steps for share in self.milestones)
        return 1.0
