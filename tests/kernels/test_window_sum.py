"""Window sums: the reference by definition, the Triton kernel by the reference."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tn_kfac.kernels.window_sum import window_sum, window_sum_reference
from tn_kfac.tensor_network.pattern import SpatialAxis


@st.composite
def axes(draw: st.DrawFn) -> SpatialAxis:
    kernel, dilation = draw(st.integers(1, 4)), draw(st.integers(1, 2))
    left, right = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    least = max(1, dilation * (kernel - 1) + 1 - left - right)
    size = least + draw(st.integers(0, 6))
    return SpatialAxis(size, kernel, draw(st.integers(1, 4)), (left, right), dilation)


def by_definition(x: torch.Tensor, spatial: list[SpatialAxis]) -> torch.Tensor:
    """Add the pixel that each window has at each offset, one at a time."""
    result = x.new_zeros(len(x), *(a.kernel_size for a in spatial))
    for offset in product(*(range(a.kernel_size) for a in spatial)):
        for window in product(*(range(a.output_size) for a in spatial)):
            pixel = [
                o * a.stride + k * a.dilation - a.padding[0]
                for o, k, a in zip(window, offset, spatial, strict=True)
            ]
            if all(0 <= i < a.input_size for i, a in zip(pixel, spatial, strict=True)):
                result[(slice(None), *offset)] += x[(slice(None), *pixel)]
    return result


@given(st.lists(axes(), min_size=1, max_size=3), st.integers(0, 3))
def test_reference_is_the_definition(spatial: list[SpatialAxis], rows: int) -> None:
    x = torch.randn(rows, *(a.input_size for a in spatial), dtype=torch.float64)
    expected = by_definition(x, spatial)
    torch.testing.assert_close(window_sum_reference(x, spatial), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(window_sum(x, spatial), expected, rtol=1e-12, atol=1e-12)


CASES = [
    (rows, [SpatialAxis(*a) for a in spatial])
    for rows, spatial in [
        (1, [(1, 1, 1, (0, 0), 1)]),
        (5, [(9, 3, 2, (1, 0), 2)]),
        (40, [(6, 3, 1, (1, 1), 1), (7, 2, 3, (0, 2), 1)]),
        (3, [(65, 7, 2, (3, 3), 1), (70, 7, 2, (3, 3), 1)]),
        (2, [(8, 4, 4, (0, 0), 1), (8, 4, 4, (0, 0), 1)]),
        (2, [(150, 3, 1, (1, 1), 1), (130, 3, 1, (1, 1), 1)]),
        (3, [(70, 4, 3, (2, 5), 2), (20, 3, 1, (0, 0), 3)]),
        (2, [(75, 6, 5, (1, 0), 1), (9, 1, 1, (0, 0), 1)]),
    ]
]

INTERPRETED = """
import torch
from tests.kernels.test_window_sum import CASES
from tn_kfac.kernels import window_sum_triton
from tn_kfac.kernels.window_sum import window_sum_reference
torch.manual_seed(0)
for rows, spatial in CASES:
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 1e-2)):
        x = torch.randn(rows, *(a.input_size for a in spatial)).to(dtype)
        actual = window_sum_triton.window_sum(x, spatial)
        assert actual.dtype == dtype
        expected = window_sum_reference(x.double(), spatial)
        scale = expected.abs().max().clamp(min=1)
        assert (actual.double() - expected).abs().max() <= tolerance * scale, (rows, spatial)
print("agree")
"""


def test_kernel_agrees_under_the_interpreter() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", INTERPRETED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "agree"


COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tn_kfac.kernels import window_sum_triton as kernel
pointers = {"x": "*fp32", "y": "*fp32"}
numbers = ("rows", "height", "width", "last_1", "last_2", "blocks_2")
for stride, size in ((1, 3), (2, 7), (4, 4), (5, 6)):
    constants = {"PADDING": 1, "DILATION": 1, "STRIDE": stride, "K": size}
    constants = {f"{name}_{axis}": value for name, value in constants.items() for axis in (1, 2)}
    constants |= {"K_1_PADDED": triton.next_power_of_2(size), "ROWS": 1, "LINES": 16}
    constants |= {"WIDTH": 64, "TILES": 2, "CLASSES": stride if stride < 5 else 1}
    signature = pointers | dict.fromkeys(numbers, "i32") | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel._kernel, signature=signature, constexprs=constants)
    target = GPUTarget("cuda", 90, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": 1})
    assert ".entry" in compiled.asm["ptx"]
print("compiled")
"""


def test_kernel_compiles_without_a_device() -> None:
    """What the interpreter lets pass, a compiler may refuse."""
    pytest.importorskip("triton", reason="Triton is not installed")
    command = [sys.executable, "-c", COMPILED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "compiled"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "spatial"), CASES)
def test_kernel_agrees_on_the_device(
    rows: int, spatial: list[SpatialAxis], dtype: torch.dtype
) -> None:
    x = torch.randn(rows, *(a.input_size for a in spatial), device="cuda").to(dtype)
    expected = window_sum_reference(x.double(), spatial)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    actual = window_sum(x, spatial)
    assert actual.dtype == dtype
    scale = expected.abs().max().clamp(min=1)
    assert (actual.double() - expected).abs().max() <= tolerance * scale
