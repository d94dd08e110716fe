"""The data sets, none of which is downloaded: made once by `--prepare`, then carried as one file.

digits: scikit-learn's 1797 handwritten digits of 8x8 pixels. glyphs: see `glyphs`. text: the source
of Python's standard library (without its tests), as bytes; every twentieth file is held out.
Curves are drawn when they are needed (`benchmarks.curves.data`).
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.curves.data import data as curves
from benchmarks.machine import ROOT
from benchmarks.time_to_target import glyphs

FILE = ROOT / "runs" / "time-to-target" / "data.npz"
GLYPHS = (60_000, 5_000)
CURVES = (20_000, 5_000)
TESTS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Split:
    """Training and held-out data: inputs and targets of examples, or text and nothing."""

    train: tuple[Tensor, ...]
    held_out: tuple[Tensor, ...]


def prepare(path: Path = FILE, counts: tuple[int, int] = GLYPHS, text_bytes: int = 2**24) -> None:
    """Write all data sets into one file."""
    arrays: dict[str, np.ndarray] = {}
    arrays |= _halves("digits", *_digits(), 1797 - 450)
    arrays |= _halves("glyphs", *glyphs.pictures(sum(counts), seed=0), counts[0])
    for name, files in zip(("text_train", "text_held_out"), _sources(), strict=True):
        arrays[name] = np.frombuffer(_joined(files, text_bytes), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)  # pyright: ignore[reportArgumentType]


def _halves(name: str, x: np.ndarray, y: np.ndarray, train: int) -> dict[str, np.ndarray]:
    parts = {"train": slice(None, train), "held_out": slice(train, None)}
    return {
        f"{name}_{part}_{axis}": values[rows]
        for part, rows in parts.items()
        for axis, values in (("x", x), ("y", y.astype(np.int64)))
    }


def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    return (15.9 * pixels[order]).astype(np.uint8).reshape(-1, 8, 8), labels[order]


def _sources() -> tuple[list[Path], list[Path]]:
    """Files of the standard library, sorted; those held out are every twentieth."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [f for f in sorted(library.rglob("*.py")) if not TESTS & set(f.parts)]
    return [f for i, f in enumerate(files) if i % 20], files[::20]


def _joined(files: list[Path], size: int) -> bytes:
    text = bytearray()
    for file in files:
        if len(text) < size:
            text += file.read_bytes() + b"\n"
    return bytes(text[:size])


@lru_cache(maxsize=4)
def load(name: str, path: Path = FILE) -> tuple[Split, str]:
    """A data set, and what tells it from another of the same name.

    Raises:
        FileNotFoundError: If the file was not prepared.
    """
    if name == "curves":
        train, held_out = curves(*CURVES)
        return Split((train, train), (held_out, held_out)), "drawn"
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist: make it with python -m benchmarks.time_to_target --prepare"
        )
    with np.load(path) as file:
        parts = {key: file[key] for key in sorted(file.files) if key.startswith(name)}
    digest = hashlib.sha256(b"".join(a.tobytes() for a in parts.values())).hexdigest()[:8]
    if name == "text":
        tensors = [torch.from_numpy(parts[f"text_{part}"]) for part in ("train", "held_out")]
        return Split((tensors[0],), (tensors[1],)), digest
    halves = [_examples(parts, f"{name}_{part}") for part in ("train", "held_out")]
    return Split(halves[0], halves[1]), digest


def _examples(parts: dict[str, np.ndarray], key: str) -> tuple[Tensor, Tensor]:
    """Images (n, 1, height, width) in −1 … 1, and labels."""
    images = torch.from_numpy(parts[f"{key}_x"]).float().div(127.5).sub(1)[:, None]
    return images, torch.from_numpy(parts[f"{key}_y"])


def epochs(count: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Indices without end, each epoch in an order of its own; what is left of one is dropped."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from (part for part in order.split(batch) if len(part) == batch)


def windows(count: int, batch: int, context: int, seed: int) -> Iterator[Tensor]:
    """Indices (batch, context + 1) of random pieces of a text of `count` bytes, without end."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(context + 1)
    while True:
        start = torch.randint(count - context, (batch, 1), generator=generator)
        yield start + offsets
