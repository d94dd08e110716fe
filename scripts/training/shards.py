"""ImageNet, or other photographs, in WebDataset's shards: tar files of images and classes."""

from __future__ import annotations

import glob
from importlib.util import find_spec
from pathlib import Path

import torch

from training.cache import cached, stamps
from training.data import Images
from training.tars import LAYOUT, Samples, index
from training.transforms import Policy, to_evaluate, to_train
from training.types import ClosedUnitInterval, NonNegativeInt, PositiveInt


class Shards(Images):
    """Colour images in tar files on disks: samples KEY.jpg with KEY.cls, in WebDataset's layout.

    Samples are read by index (kept in a cache, made before the first run), not as streams. So the
    order depends on the seed alone: not on ranks and workers, which share each batch, nor on
    where a run was interrupted. Every node needs all shards.

    Args:
        train: Shards to train on: paths, with braces `train-{0000..1281}.tar` or wildcards.
        val: Shards to evaluate on, likewise.
        classes: Number of classes; `KEY.cls` holds a number from 0 to this, exclusive.
        mixed: Shards whose images are shuffled together; their order is random too.
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
        train: str | list[str],
        val: str | list[str],
        classes: PositiveInt = 1000,
        mixed: PositiveInt = 64,
        size: PositiveInt = 224,
        resize: PositiveInt = 256,
        policy: Policy = "none",
        erasing: ClosedUnitInterval = 0.0,
        batch_size: PositiveInt = 256,
        workers: NonNegativeInt = 8,
        seed: NonNegativeInt = 0,
    ) -> None:
        super().__init__(batch_size, workers, seed)
        if find_spec("webdataset") is None:
            raise ValueError(
                "data: Shards needs webdataset, which is not installed; pip install webdataset"
            )
        self.paths = {"train": expand("train", train), "val": expand("val", val)}
        self.num_classes, self.mixed = classes, mixed
        self.transforms = to_train(size, policy, erasing), to_evaluate(size, resize)

    def prepare_data(self) -> None:
        """Let one process of each node make the index; the others find it in the cache."""
        self.setup("fit")

    def load(self) -> tuple[Samples, Samples]:
        transforms = zip(self.paths, self.transforms, strict=True)
        train, val = (self._samples(part, transform) for part, transform in transforms)
        return train, val

    def _samples(self, part: str, transform: object) -> Samples:
        paths, classes = self.paths[part], int(self.num_classes)
        settings = {"shards": stamps(paths), "classes": classes}
        try:
            table = cached("shards", settings, lambda: index(paths, classes))
        except (OSError, ValueError) as error:
            raise ValueError(f"data.{part}: {error}") from None
        return Samples(paths, table, transform)

    def order(self, generator: torch.Generator) -> torch.Tensor:
        """Shards at random, `mixed` of them at a time, the images of these at random."""
        assert self.parts is not None
        shard = torch.from_numpy(self.parts[0].table["shard"])
        place = torch.randperm(len(self.paths["train"]), generator=generator)
        shuffled = torch.randperm(len(shard), generator=generator)
        return shuffled[(place[shard] // self.mixed)[shuffled].argsort(stable=True)]


def expand(part: str, given: str | list[str]) -> list[Path]:
    """The files that patterns stand for, in order.

    Raises:
        ValueError: If one of them is not there.
    """
    from webdataset.shardlists import expand_urls

    patterns = [given] if isinstance(given, str) else given
    try:
        names = [name for pattern in patterns for name in expand_urls(pattern)]
    except (AssertionError, ValueError) as error:  # a variable or a brace that is not there
        raise ValueError(f"data.{part}: {given!r} cannot be expanded ({error})") from None
    paths: list[Path] = []
    for name in names:
        path = Path(name).expanduser()
        found = sorted(map(Path, glob.glob(str(path)))) if glob.has_magic(name) else [path]
        if not found or not found[0].is_file():
            raise ValueError(f"data.{part}: there is no file {name!r}; {LAYOUT}")
        paths += found
    if len(set(paths)) < max(1, len(paths)):
        raise ValueError(f"data.{part}: {given!r} names no shard, or one twice; {LAYOUT}")
    return paths
