"""Optimizers by name, for a whole network."""

import inspect
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from tn_kfac import KFAC, SINGD
from training.muon import MuonAdamW


@dataclass(frozen=True)
class OptimizerChoice:
    """Which optimizer, and its arguments.

    Args:
        name: SGD, AdamW, Muon (of torch; AdamW for what Muon does not take), SINGD or KFAC.
        options: Its keyword arguments, as `{lr: 0.1, momentum: 0.9}`.
        decay_vectors: Whether weight decay holds for biases and norm layers too.
    """

    name: Literal["SGD", "AdamW", "Muon", "SINGD", "KFAC"] = "SGD"
    options: dict[str, Any] = field(default_factory=lambda: {"lr": 0.1, "momentum": 0.9})
    decay_vectors: bool = True

    def __post_init__(self) -> None:
        known = set(inspect.signature(CLASSES[self.name].__init__).parameters)
        known -= {"self", "model", "params", "process_group"}
        if unknown := sorted(set(self.options) - known):
            raise ValueError(
                f"optimizer.options: {self.name} takes no {', '.join(unknown)}; it takes "
                f"{', '.join(sorted(known))}"
            )

    @property
    def wants_outputs(self) -> bool:
        """Whether curvature comes from the outputs, not from the gradients alone."""
        fisher = self.options.get("fisher", "empirical")
        return fisher in ("mc", "type-2") or bool(self.options.get("adaptive", False))


CLASSES: dict[str, type[torch.optim.Optimizer]] = {
    "SGD": torch.optim.SGD,
    "AdamW": torch.optim.AdamW,
    "Muon": MuonAdamW,
    "SINGD": SINGD,
    "KFAC": KFAC,
}


def build(choice: OptimizerChoice, network: nn.Module) -> torch.optim.Optimizer:
    """Make the optimizer of all parameters of `network` that need gradients.

    Raises:
        ValueError: If its options are wrong.
    """
    kind, options = CLASSES[choice.name], dict(choice.options)
    groups: Any = [p for p in network.parameters() if p.requires_grad]
    if not choice.decay_vectors:
        vectors = {"params": [p for p in groups if p.ndim < 2], "weight_decay": 0.0}
        groups = [{"params": [p for p in groups if p.ndim >= 2]}, vectors]
    try:
        if choice.name in ("SGD", "AdamW"):
            return kind(groups, **options)
        if not choice.decay_vectors:
            return kind(network, params=groups, **options)  # type: ignore[call-arg]
        return kind(network, **options)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise ValueError(f"optimizer.options: {choice.name}: {error}") from None
