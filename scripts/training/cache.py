"""Arrays that are slow to make, kept in a file that is never trusted when it is not whole."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]


def cached(name: str, settings: dict[str, Any], make: Callable[[], Arrays]) -> Arrays:
    """The arrays that `make` returns, from `name`-HASH.npz in `folder()` if it was made before.

    Args:
        name: Beginning of the file's name.
        settings: All that the arrays depend on, as JSON can hold it; HASH is of it.
        make: Makes the arrays. Where they cannot be written they are made every time.
    """
    text = json.dumps(settings, sort_keys=True)
    path = folder() / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:24]}.npz"
    found = _read(path, text)
    if found is None:
        found = make()
        _write(path, text, found)
    return found


def folder() -> Path:
    """$TN_KFAC_CACHE, or `tn_kfac` where the system keeps caches."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("TN_KFAC_CACHE") or Path(base, "tn_kfac")).expanduser()


def stamps(paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    """What tells these files from others: path, bytes, time of the last change."""
    return [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]


def _read(path: Path, settings: str) -> Arrays | None:
    """The file's arrays; None unless it is whole (zip files hold checksums) and of `settings`."""
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = dict(file)
    except (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile):
        return None
    return arrays if str(arrays.pop("settings", "")) == settings else None


def _write(path: Path, settings: str, arrays: Arrays) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.savez(file, settings=np.array(settings), **arrays)  # type: ignore[arg-type]
        os.replace(temporary, path)
    except OSError:  # no place to write to: then without
        with suppress(OSError):
            temporary.unlink()
