"""ImageNet, or anything laid out like it: a folder of images for every class."""

from __future__ import annotations

from pathlib import Path

from torchvision.datasets import ImageFolder

from training.data import Images
from training.transforms import Policy, to_evaluate, to_train
from training.types import ClosedUnitInterval, NonNegativeInt, PositiveInt

LAYOUT = "expected ROOT/train/CLASS/IMAGE.jpg and ROOT/val/CLASS/IMAGE.jpg with the same classes"


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
        self.transforms = to_train(size, policy, erasing), to_evaluate(size, resize)
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
        parts = zip(("train", "val"), self.transforms, strict=True)
        try:
            train, val = (ImageFolder(self.root / part, transform) for part, transform in parts)
        except FileNotFoundError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"data.root: {str(self.root)!r}: {reason} {LAYOUT}") from None
        return train, val
