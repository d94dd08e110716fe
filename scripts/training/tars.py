"""Where the samples of tar files begin: WebDataset shards as images by index."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

LAYOUT = (
    "expected uncompressed tar files whose samples are KEY.jpg (or .jpeg, .png, .webp) beside "
    "KEY.cls with the number of the class"
)
IMAGES = ("jpg", "jpeg", "png", "webp")


def index(paths: list[Path], classes: int) -> dict[str, np.ndarray]:
    """Every sample of the shards: `shard`, `begin` and `size` (of its image, bytes), `label`.

    Headers are read, not images.

    Raises:
        ValueError: If a shard is cut off or no tar file, or a sample is not as `LAYOUT` says.
    """
    rows = [(n, *sample) for n, path in enumerate(paths) for sample in _samples(path, classes)]
    if not rows:
        raise ValueError(f"{str(paths[0])!r} (and all others) hold no sample; {LAYOUT}")
    table = np.array(rows, dtype=np.int64)
    return dict(zip(("shard", "begin", "size", "label"), table.T, strict=True))


def _samples(path: Path, classes: int) -> Iterator[tuple[int, int, int]]:
    """Begin, size and label of each sample of one shard."""
    with path.open("rb") as file:
        for key, members in _grouped(path):
            images, label = [m for s, m in members if s in IMAGES], dict(members).get("cls")
            if len(images) != 1 or label is None:
                names = ", ".join(suffix for suffix, _ in members)
                raise ValueError(f"{str(path)!r}: sample {key!r} has the files {names}; {LAYOUT}")
            text = _piece(file, label.offset_data, label.size)
            if not (text.strip().isdigit() and int(text) < classes):
                raise ValueError(
                    f"{str(path)!r}: the class of sample {key!r} is {text[:20]!r}, no number from "
                    f"0 to {classes - 1} (data.classes: {classes}); {LAYOUT}"
                )
            yield images[0].offset_data, images[0].size, int(text)


def _grouped(path: Path) -> Iterator[tuple[str, list[tuple[str, tarfile.TarInfo]]]]:
    """Keys, each with its files by suffix: consecutive files of one name, as WebDataset has it."""
    from webdataset.tariterators import base_plus_ext

    current, members = None, []
    for member in _members(path):
        key, suffix = base_plus_ext(member.name)
        if key is None or suffix is None or not member.isreg() or member.name.startswith("__"):
            continue
        if key != current and current is not None:
            yield current, members
            members = []
        current = key
        members.append((suffix.lower(), member))
    if current is not None:
        yield current, members


def _members(path: Path) -> list[tarfile.TarInfo]:
    try:
        with path.open("rb") as file:
            file.seek(-min(512, path.stat().st_size), io.SEEK_END)
            whole = file.read() == bytes(512)  # tar files end in zeros
        with tarfile.open(path, "r:") as archive:
            members = archive.getmembers()
    except (tarfile.TarError, EOFError):
        raise ValueError(f"{str(path)!r} is cut off or no tar file; {LAYOUT}") from None
    if not whole:
        raise ValueError(f"{str(path)!r} is cut off; {LAYOUT}")
    return members


def _piece(file: Any, begin: int, size: int) -> bytes:
    file.seek(begin)
    return file.read(size)


class Samples:
    """Images of shards and their labels, by index."""

    def __init__(self, paths: list[Path], table: dict[str, np.ndarray], transform: Any) -> None:
        self.paths, self.table, self.transform = paths, table, transform

    def __len__(self) -> int:
        return len(self.table["label"])

    def __getitem__(self, at: int) -> tuple[Any, int]:
        from webdataset.autodecode import imagehandler

        shard, begin, size, label = (
            int(self.table[name][at]) for name in ("shard", "begin", "size", "label")
        )
        with self.paths[shard].open("rb") as file:
            content = _piece(file, begin, size)
        try:
            picture = imagehandler("pilrgb")(IMAGES[0], content)  # PIL goes by the content
        except OSError as error:
            raise ValueError(
                f"{str(self.paths[shard])!r}: the image at byte {begin} cannot be read ({error})"
            ) from None
        return self.transform(picture), label
