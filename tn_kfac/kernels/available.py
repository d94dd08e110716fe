"""Where Triton kernels run."""

from __future__ import annotations

import torch

try:
    import triton
except ImportError:  # not on this machine
    triton = None


def _nothing() -> None:
    """A kernel, to see what Triton makes of one."""


INTERPRETED = triton is not None and not isinstance(triton.jit(_nothing), triton.JITFunction)
"""Whether they run in Triton's interpreter, on a CPU."""


def available(device: torch.device) -> bool:
    """Whether kernels run on tensors of a device."""
    return triton is not None and (device.type == "cuda" or INTERPRETED)
