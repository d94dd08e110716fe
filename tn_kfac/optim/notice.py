"""One warning of factors that could not be inverted, read when that costs no waiting.

The flags pass through an operator of ours, so that compiled steps report too.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from weakref import WeakValueDictionary

import torch
from torch import Tensor


class Notice:
    """Watches flags that the device computes, and warns once that some were false."""

    def __init__(self) -> None:
        self._told = False
        self._waiting: list[tuple[list[str], Tensor, torch.cuda.Event | None]] = []
        self._key = next(_keys)
        _notices[self._key] = self

    def watch(self, names: Sequence[Sequence[str]], fits: Sequence[Tensor]) -> list[Tensor]:
        """Note which of the named factors fit, (groups) names and flags each; returns the flags.

        The host waits for them on a CPU alone; on a GPU a warning comes with a later call.
        """
        flags = torch.cat(list(fits))
        flags = _watched(self._key, "\n".join(name for own in names for name in own), flags)
        return list(flags.split([len(own) for own in fits]))

    def note(self, names: list[str], flags: Tensor) -> None:
        """Keep flags until they are known; those of a captured CUDA graph never are."""
        if self._told or (flags.is_cuda and torch.cuda.is_current_stream_capturing()):
            return  # while capturing, no event may be queried
        if flags.is_cuda:
            pinned = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
            pinned.copy_(flags, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._waiting.append((names, pinned, event))
        else:
            self._waiting.append((names, flags, None))
        self._tell()

    def _tell(self) -> None:
        """Warn of what is known by now."""
        later = []
        for names, flags, event in self._waiting:
            if event is not None and not event.query():
                later.append((names, flags, event))
                continue
            bad = [name for name, fits in zip(names, flags.tolist(), strict=True) if not fits]
            if bad and not self._told:
                self._told = True
                warnings.warn(
                    f"factors without an inverse keep their last one: {', '.join(bad)}. More "
                    "damping helps; if gradients are not finite, look there first. Further cases "
                    "are not reported",
                    stacklevel=8,
                )
        self._waiting = later


_notices: WeakValueDictionary[int, Notice] = WeakValueDictionary()
_keys = itertools.count()


@torch.library.custom_op("tn_kfac::watched", mutates_args=())
def _watched(key: int, names: str, flags: Tensor) -> Tensor:
    """The flags, after a note of them."""
    _notices[key].note(names.split("\n"), flags)
    return flags.clone()


@_watched.register_fake
def _(key: int, names: str, flags: Tensor) -> Tensor:
    return torch.empty_like(flags)
