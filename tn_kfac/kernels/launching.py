"""Launches of compiled Triton kernels, without what Triton does anew for each of them."""

# pyright: reportMissingImports=false, reportMissingModuleSource=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton

KNOWN = ("3.6", "3.7", "3.8")
"""Releases of Triton whose compiled kernels `run` as is said here."""


def launcher(compiled: Any, programs: int, device: torch.device) -> Callable[..., None]:
    """`compiled[(programs, 1, 1)]` for a device that is current; pointers may be integers.

    Triton looks up the device, makes a closure, and for each launch a record for profilers. That
    record is made only where a profiler hooked launches.
    """
    public = compiled[programs, 1, 1]
    stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    if triton.__version__.rpartition(".")[0] not in KNOWN or stream is None:
        return public
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    index, hooks = device.index, triton.knobs.runtime

    def launch(*arguments: Any) -> None:
        if _hooked(hooks.launch_enter_hook) or _hooked(hooks.launch_exit_hook):
            public(*arguments)
        else:
            run(programs, 1, 1, stream(index), function, metadata, None, None, None, *arguments)

    return launch


def _hooked(hook: Any) -> bool:
    """Whether somebody is to be told of launches."""
    return hook is not None and bool(getattr(hook, "calls", True))
