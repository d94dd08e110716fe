"""What is done to colour photographs, to train on them and to evaluate."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torchvision.transforms import v2

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Policy = Literal["none", "autoaugment", "randaugment", "trivialaugment", "augmix"]
POLICIES: dict[str, type] = {
    "autoaugment": v2.AutoAugment,
    "randaugment": v2.RandAugment,
    "trivialaugment": v2.TrivialAugmentWide,
    "augmix": v2.AugMix,
}


def to_train(size: int, policy: Policy, erasing: float) -> Any:
    """Random crop and flip, the policy, normalisation, erasing."""
    steps = [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
    if policy != "none":
        steps.append(POLICIES[policy]())
    last = [v2.RandomErasing(erasing)] if erasing else []
    return v2.Compose([v2.ToImage(), *steps, *_normalise(), *last, v2.ToPureTensor()])


def to_evaluate(size: int, resize: int) -> Any:
    """Resize, centre crop, normalisation."""
    steps = [v2.Resize(resize, antialias=True), v2.CenterCrop(size)]
    return v2.Compose([v2.ToImage(), *steps, *_normalise(), v2.ToPureTensor()])


def _normalise() -> list[Any]:
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, DEVIATION)]
