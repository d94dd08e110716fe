"""ImageNet, or anything laid out like it: a folder of images for every class."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from training.data import Images
from training.types import ClosedUnitInterval, NonNegativeInt, PositiveInt

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LAYOUT = "expected ROOT/train/CLASS/IMAGE.jpg and ROOT/val/CLASS/IMAGE.jpg with the same classes"
Policy = Literal["none", "autoaugment", "randaugment", "trivialaugment", "augmix"]


class Folder(Images):
    """Colour images in ROOT/train/CLASS/ and ROOT/val/CLASS/, as ImageNet is commonly laid out.

    Args:
        root: The folder that holds `train` and `val`.
        size: Height and width of a random crop, and of the centre crop to evaluate.
        resize: Length of the shorter side before the centre crop.
        policy: Automatic augmentation of training images.
        erasing: Probability that a random rectangle is erased.
        batch_size: Images a step, over all ranks (and before accumulation).
        workers: Processes that load images, for each rank.
        seed: Of the order and the random transforms; `seed_everything` unless given.
    """

    in_channels = 3

    def __init__(
        self,
        root: str,
        size: PositiveInt = 224,
        resize: PositiveInt = 256,
        policy: Policy = "none",
        erasing: ClosedUnitInterval = 0.0,
        batch_size: PositiveInt = 256,
        workers: NonNegativeInt = 8,
        seed: NonNegativeInt = 0,
    ) -> None:
        super().__init__(batch_size, workers, seed)
        self.root = Path(root).expanduser()
        self.size, self.resize, self.policy, self.erasing = size, resize, policy, erasing
        self.classes = self._classes()
        self.num_classes = len(self.classes)

    def _classes(self) -> list[str]:
        """Names of the classes, the same in both parts."""
        if not self.root.is_dir():
            raise ValueError(f"data.root: {str(self.root)!r} is no folder; {LAYOUT}")
        found = {}
        for part in ("train", "val"):
            folder = self.root / part
            if not folder.is_dir():
                raise ValueError(f"data.root: there is no folder {str(folder)!r}; {LAYOUT}")
            found[part] = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
            if not found[part]:
                raise ValueError(f"data.root: no class folder in {str(folder)!r}; {LAYOUT}")
        if odd := sorted(set(found["train"]) ^ set(found["val"])):
            names = ", ".join(odd[:3]) + (", …" if len(odd) > 3 else "")
            raise ValueError(
                f"data.root: {str(self.root)!r} has {len(odd)} classes in only one of train and "
                f"val ({names}); {LAYOUT}"
            )
        return found["train"]

    def load(self) -> tuple[ImageFolder, ImageFolder]:
        parts = (("train", self.train_transform()), ("val", self.eval_transform()))
        try:
            train, val = (ImageFolder(self.root / part, transform) for part, transform in parts)
        except FileNotFoundError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"data.root: {str(self.root)!r}: {reason} {LAYOUT}") from None
        return train, val

    def train_transform(self) -> Any:
        """Random crop and flip, the policy, normalisation, erasing."""
        policies: dict[str, type] = {
            "autoaugment": v2.AutoAugment,
            "randaugment": v2.RandAugment,
            "trivialaugment": v2.TrivialAugmentWide,
            "augmix": v2.AugMix,
        }
        steps = [v2.RandomResizedCrop(self.size, antialias=True), v2.RandomHorizontalFlip()]
        if self.policy != "none":
            steps.append(policies[self.policy]())
        last = [v2.RandomErasing(self.erasing)] if self.erasing else []
        return v2.Compose([v2.ToImage(), *steps, *self._normalise(), *last, v2.ToPureTensor()])

    def eval_transform(self) -> Any:
        """Resize, centre crop, normalisation."""
        steps = [v2.Resize(self.resize, antialias=True), v2.CenterCrop(self.size)]
        return v2.Compose([v2.ToImage(), *steps, *self._normalise(), v2.ToPureTensor()])

    def _normalise(self) -> list[Any]:
        return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, DEVIATION)]
