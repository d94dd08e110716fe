"""What launches for many tensors at once read, kept on the device from step to step."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tn_kfac.kernels.launching import Prepared

KEPT = 64
"""Sets of layers whose tables are kept: which layers have gradients may differ in every step."""


class Tables:
    """What launches need: tables of addresses and of programs on the device, and kernels.

    All of it is kept as long as it does not change, for `KEPT` sets of layers at most; what a
    captured CUDA graph reads, for good.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[list[int], Tensor, Tensor]] = {}
        self._programs: dict[Hashable, Tensor] = {}
        self._kernels: dict[Hashable, Prepared] = {}
        self._spare: dict[Hashable, Tensor] = {}
        self._scratch: dict[torch.device, Tensor] = {}
        self._captured: list[Any] = []

    def programs(self, key: Hashable, make: Callable[[], Tensor], device: torch.device) -> Tensor:
        """What each program does; `key` says what it depends on."""
        captured = _captures(device)
        if key not in self._programs:
            if len(self._programs) >= KEPT and not captured:
                for kept in (self._programs, self._known, self._kernels, self._spare):
                    kept.clear()
            self._programs[key] = make().to(device, torch.int32)
        programs = self._programs[key]
        if captured:
            self._captured.append(programs)
        return programs

    def kernel(self, key: Hashable, make: Callable[[], Prepared]) -> Prepared:
        """A kernel; `key` says what it depends on."""
        if key not in self._kernels:
            self._kernels[key] = make()
        return self._kernels[key]

    def scratch(self, numbers: int, device: torch.device) -> Tensor:
        """Memory for so many float32 numbers, at least, that one launch leaves to the next."""
        held = self._scratch.get(device)
        if held is None or len(held) < numbers:
            held = self._scratch[device] = torch.empty(numbers, device=device)
        if _captures(device):
            self._captured.append(held)
        return held

    def addresses(self, key: Hashable, values: list[int], device: torch.device) -> Tensor:
        """The values on the device. `key` is whose they are: they may differ in every step."""
        known = self._known.get(key)
        if known is not None and known[0] == values:
            if _captures(device):
                self._captured.append(known)
            return known[1]
        if device.type != "cuda":
            table = _tensor(values)
            self._known[key] = (values, table, table)
            return table
        return self._uploaded(key, values, device)

    def _uploaded(self, key: Hashable, values: list[int], device: torch.device) -> Tensor:
        """The same, without waiting for the device.

        A CUDA graph that is captured reads the pinned memory whenever it is replayed; so that
        memory is its own, and was allocated before.
        """
        captured = _captures(device)
        host = self._spare.pop(key, None) if captured else None
        if host is None:
            host = torch.empty(len(values), dtype=torch.int64, pin_memory=True)
        host.copy_(_tensor(values))
        table = host.to(device, non_blocking=True)
        if captured:
            # What was known is kept too: pinned memory that is freed while its stream is captured
            # leaves torch an event that it cannot query.
            self._captured.append((table, host, self._known.pop(key, None)))
        else:
            self._known[key] = (values, table, host)
            if key not in self._spare:
                self._spare[key] = torch.empty(len(values), dtype=torch.int64, pin_memory=True)
        return table


def _tensor(values: list[int]) -> Tensor:
    """The values, in a quarter of the time that `torch.tensor` takes."""
    return torch.frombuffer(array("q", values), dtype=torch.int64)


def _captures(device: torch.device) -> bool:
    """Whether launches on the device go into a CUDA graph now."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
