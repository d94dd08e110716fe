"""Launches of Triton kernels, without what Triton does anew for each of them."""

# pyright: reportMissingImports=false, reportMissingModuleSource=false

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs

Launcher = Callable[[Sequence[int], Sequence[float]], None]
KNOWN = ("3.6", "3.7", "3.8")
"""Releases of Triton whose compiled kernels `run` as is said here."""


class Prepared:
    """A kernel with its constants and its grid, for tensors of the same dtypes and device.

    Args:
        kernel: The kernel: tensors first, then numbers, constants last.
        programs: The grid.
        constants: By name.
        options: Of the compiler.
    """

    def __init__(self, kernel: Any, programs: int, constants: Mapping[str, Any],
                 **options: int) -> None:  # fmt: skip
        self._kernel, self._programs, self._options = kernel, programs, options
        self._constants = {name: constants[name] for name in kernel.arg_names if name in constants}
        self._compiled: dict[tuple[int, ...], Launcher] = {}

    def __call__(self, tensors: Sequence[Tensor], numbers: Sequence[float]) -> None:
        """Launch it; integers among the numbers are those of the last time.

        Triton compiles for such integers too, and for whether tensors are aligned.
        """
        pointers, bits = [], 0
        for tensor in tensors:
            pointer = tensor.data_ptr()
            pointers.append(pointer)
            bits |= pointer
        known = tuple(pointer % 16 for pointer in pointers) if bits % 16 else ()
        launch = self._compiled.get(known)
        if launch is not None:
            launch(pointers, numbers)
            return
        kernel = self._kernel[(self._programs,)]
        found = kernel(*tensors, *numbers, **self._constants, **self._options)
        if found is not None:  # the interpreter compiles nothing
            device = tensors[0].device
            self._compiled[known] = launcher(found, self._programs, device, self._constants)


def launcher(
    compiled: Any, programs: int, device: torch.device, constants: Mapping[str, Any]
) -> Launcher:
    """`compiled[(programs, 1, 1)]` of pointers and numbers, on a device that is current.

    Triton would look up the device, ask the driver about each tensor, and make a record for
    profilers. It does so where a profiler hooked launches, and where its inside is not known.
    """
    public, last = compiled[programs, 1, 1], tuple(constants.values())
    stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    if ".".join(triton.__version__.split(".")[:2]) not in KNOWN or stream is None:
        return lambda pointers, numbers: public(*pointers, *numbers, *last)
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    index, hooks = device.index, knobs.runtime

    def launch(pointers: Sequence[int], numbers: Sequence[float]) -> None:
        try:
            hooked = hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls
        except AttributeError:  # somebody put a function in its place
            hooked = True
        if hooked:
            public(*pointers, *numbers, *last)
        else:
            run(programs, 1, 1, stream(index), function, metadata, None, None, None,
                *pointers, *numbers, *last)  # fmt: skip

    return launch
