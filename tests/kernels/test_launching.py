"""Prepared launches: what Triton is asked once, and when it is asked again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")
from triton import knobs

from tn_kfac.kernels import launching
from tn_kfac.kernels.launching import Prepared

STREAM = 7


class Compiled:
    """What Triton hands out for a kernel, as far as launches need it."""

    function, packed_metadata = 11, (1, 2)

    def __init__(self) -> None:
        self.direct: list[tuple[Any, ...]] = []
        self.public: list[tuple[Any, ...]] = []

    def run(self, *arguments: Any) -> None:
        self.direct.append(arguments)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.public.append((grid, *arguments))


class Kernel:
    """A kernel that counts how often Triton would look for it."""

    arg_names = ("x", "out", "size", "scale", "BLOCK", "WIDE")

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.compiled = Compiled()

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **constants: Any) -> Compiled:
            self.asked.append({"grid": grid, "arguments": arguments, **constants})
            return self.compiled

        return launch


@pytest.fixture(autouse=True)
def stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: STREAM, raising=False)


def made() -> tuple[Kernel, Prepared, tuple[Tensor, Tensor]]:
    kernel = Kernel()
    tensors = (torch.zeros(32), torch.zeros(32))
    return kernel, Prepared(kernel, 5, {"WIDE": True, "BLOCK": 8}, num_warps=4), tensors


def test_triton_is_asked_once() -> None:
    kernel, prepared, tensors = made()
    for scale in (1.0, 2.0, 3.0):
        prepared(tensors, (32, scale))
    assert kernel.asked == [
        {"grid": (5,), "arguments": (*tensors, 32, 1.0), "BLOCK": 8, "WIDE": True, "num_warps": 4}
    ]
    pointers = tuple(tensor.data_ptr() for tensor in tensors)
    before = (5, 1, 1, STREAM, 11, (1, 2), None, None, None)
    assert kernel.compiled.direct == [
        (*before, *pointers, 32, scale, 8, True) for scale in (2.0, 3.0)
    ]
    assert not kernel.compiled.public


def test_tensors_that_are_not_aligned_have_a_kernel_of_their_own() -> None:
    kernel, prepared, (x, out) = made()
    for tensor in (x, x[1:], x[4:], x[1:]):
        prepared((tensor, out), (28, 1.0))
    assert [asked["arguments"][0].data_ptr() - x.data_ptr() for asked in kernel.asked] == [0, 4]
    assert len(kernel.compiled.direct) == 2


def test_profilers_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, prepared, tensors = made()
    prepared(tensors, (32, 1.0))
    hook = lambda *_: None  # noqa: E731
    knobs.runtime.launch_enter_hook.add(hook)
    prepared(tensors, (32, 2.0))
    knobs.runtime.launch_enter_hook.remove(hook)
    prepared(tensors, (32, 3.0))
    monkeypatch.setattr(knobs.runtime, "launch_exit_hook", hook)  # as before Triton 3.5
    prepared(tensors, (32, 4.0))
    assert [call[-3] for call in kernel.compiled.public] == [2.0, 4.0]
    assert [call[0] for call in kernel.compiled.public] == [(5, 1, 1)] * 2
    assert len(kernel.compiled.direct) == 1


def test_another_triton_is_launched_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "KNOWN", ())
    kernel, prepared, tensors = made()
    for _ in range(2):
        prepared(tensors, (32, 1.0))
    assert len(kernel.compiled.public) == 1
    assert not kernel.compiled.direct


def test_a_kernel_that_is_not_compiled_is_asked_for_every_time() -> None:
    """So it is in Triton's interpreter."""
    kernel, prepared, tensors = made()
    kernel.compiled = None  # pyright: ignore[reportAttributeAccessIssue]
    for _ in range(2):
        prepared(tensors, (32, 1.0))
    assert len(kernel.asked) == 2
