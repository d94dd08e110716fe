"""Diagonal factors of a call in one launch: the kernel by its plain-torch reference."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.interpreted import DEVICE, needs_kernels, run_interpreted, run_script
from tests.kernels.test_window_sum import axes, by_definition
from tn_kfac.kernels.diagonals import Request, diagonals, diagonals_reference
from tn_kfac.kernels.diagonals_launch import COUNTERS
from tn_kfac.tensor_network.pattern import SpatialAxis

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@st.composite
def calls(draw: st.DrawFn) -> tuple[Tensor, Tensor, Request]:
    """An input and an output gradient, in all ways in which they may lie in memory."""
    spatial = tuple(draw(st.lists(axes(), max_size=2)))
    shared = [draw(st.integers(1, 9))] if not spatial and draw(st.booleans()) else []
    pixels = [axis.input_size for axis in spatial] or shared
    positions = [axis.output_size for axis in spatial] or shared
    groups = draw(st.integers(1, 3))
    samples, channels = draw(st.integers(1, 5)), groups * draw(st.sampled_from((1, 2, 5, 40)))
    outputs = groups * draw(st.sampled_from((1, 3, 50)))
    tensors = []
    order = draw(st.sampled_from(("channels first", "channels last", "strided")))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    for shape in ((samples, channels, *pixels), (samples, outputs, *positions)):
        if order == "channels last":
            tensor = torch.randn(shape[0], *shape[2:], shape[1], generator=generator)
            tensor = tensor.movedim(-1, 1)
        elif order == "strided":
            tensor = torch.randn(*shape, 2, generator=generator)[..., 0]
        else:
            tensor = torch.randn(shape, generator=generator)
        tensors.append(tensor.to(DEVICE, dtype))
    reduce, bias = draw(st.booleans()), draw(st.booleans())
    terms, scale = draw(st.integers(0, 4)), draw(st.sampled_from((1.0, 2.5)))
    return *tensors, Request(spatial, groups, reduce, bias, float(terms), scale)


def agree(x: Tensor, v: Tensor, request: Request) -> None:
    counters = torch.zeros(COUNTERS, dtype=torch.int32, device=DEVICE)
    found = diagonals(x, v, request, counters)
    assert found is not None
    expected = diagonals_reference(x, v, request, torch.float64)
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found.double(), expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item()
    )
    again = diagonals(x, v, request, counters)
    torch.testing.assert_close(found, again, rtol=0, atol=0)
    assert not counters.any()


@needs_kernels
@given(calls())
def test_kernel_is_the_reference(call: tuple[Tensor, Tensor, Request]) -> None:
    agree(*call)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduce", [True, False])
def test_wide_lines_and_many_rows(dtype: torch.dtype, reduce: bool) -> None:
    wide = (SpatialAxis(3, 3, 1, (1, 1), 1), SpatialAxis(300, 7, 2, (3, 3), 1))
    x = torch.randn(2, 3, 3, 300).to(DEVICE, dtype)
    v = torch.randn(2, 5, 3, 150).to(DEVICE, dtype)
    agree(x, v, Request(wide, 1, reduce, True, 2.0))
    rows, more = torch.randn(2, 290, 70).to(DEVICE, dtype), torch.randn(2, 290, 130)
    agree(rows.movedim(-1, 1), more.to(DEVICE, dtype).movedim(-1, 1),
          Request((), 1, reduce, True, 2.0))  # fmt: skip


@given(calls())
def test_reference_is_the_definition(call: tuple[Tensor, Tensor, Request]) -> None:
    """Rows by adding pixels one at a time."""
    x, v, request = call
    x, v = x.double().cpu(), v.double().cpu()
    found = diagonals_reference(x, v, request, torch.float64).cpu()
    (n, c), positions, spatial = x.shape[:2], prod(v.shape[2:]), list(request.axes)
    flat = (x if request.reduce else x.square()).reshape(n * c, *x.shape[2:])
    sums = by_definition(flat, spatial) if spatial else flat.reshape(n * c, -1).sum(1)
    sums = sums.reshape(n, c, -1)
    A = (sums / positions).square().sum(0) if request.reduce else sums.sum(0)
    v = v.reshape(n, -1, positions)
    G = (v.sum(2).square() if request.reduce else v.square().sum(2)).sum(0) * request.scale
    rows = torch.tensor([n if request.reduce else n * positions], dtype=torch.float64)
    parts = [A.reshape(request.groups, -1)]
    parts += [rows.expand(request.groups, 1)] if request.bias else []
    expected = [torch.cat(parts, dim=1).flatten(), G, rows, torch.tensor([request.terms])]
    torch.testing.assert_close(found, torch.cat(expected).double(), rtol=1e-10, atol=1e-10)


def test_what_the_kernel_does_not_do() -> None:
    counters = torch.zeros(COUNTERS, dtype=torch.int32)
    x, v = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4)
    request = Request((), 1, True, False, 1.0)
    assert diagonals(x.double(), v, request, counters) is None
    assert diagonals(x[:0], v[:0], request, counters) is None
    three = tuple(SpatialAxis(3, 2) for _ in range(3))
    large = (SpatialAxis(20, 17),)
    assert diagonals(torch.randn(1, 1, 3, 3, 3), torch.randn(1, 1, 2, 2, 2),
                     request._replace(axes=three), counters) is None  # fmt: skip
    assert diagonals(torch.randn(1, 1, 20), torch.randn(1, 1, 4), request._replace(axes=large),
                     counters) is None  # fmt: skip
    assert diagonals(x, v[..., :3], request, counters) is None  # positions at several distances


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_more_entries_than_an_int32_counts() -> None:
    x = torch.zeros(3, 2, 20_000, 20_000, dtype=torch.bfloat16, device="cuda")
    x[2, 1, -1, -4:] = 3.0
    v = torch.ones(3, 1, 20_000, 20_000, dtype=torch.bfloat16, device="cuda")
    counters = torch.zeros(COUNTERS, dtype=torch.int32, device="cuda")
    found = diagonals(x, v, Request((), 1, False, False, 3.0), counters)
    assert found is not None
    assert found.tolist() == [0.0, 36.0, 1.2e9, 1.2e9, 3.0]


def test_agrees_under_the_interpreter() -> None:
    run_interpreted(__file__)


COMPILED = """
from math import prod
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tn_kfac.kernels.diagonals_launch import planned
from tn_kfac.kernels.diagonals_triton import PART, STAGES, WARPS, kernel
from tn_kfac.tensor_network.pattern import SpatialAxis
pointers = {"x": "*bf16", "v": "*bf16", "out": "*fp32", "partial": "*fp32", "counters": "*i32"}
numbers = dict.fromkeys(("rows", "terms", "factor", "scale"), "fp32")
for channels, axes, wide in ((64, (SpatialAxis(64, 3, 1, (1, 1)),) * 2, (1, 1)),
                             (3, (SpatialAxis(256, 7, 2, (3, 3)),) * 2, (3, 3)), (64, (), (1, 2))):
    pixels = [axis.input_size for axis in axes] or [197]
    rows = [axis.output_size for axis in axes] or [197]
    shapes = [(8, channels, *pixels), (8, 32, *rows)]
    strides = [tuple(prod(shape[i + 1:]) for i in range(len(shape))) for shape in shapes]
    made = planned(shapes[0], strides[0], shapes[1], strides[1], axes, 1, True, True, wide)
    constants = {**made.constants, "DOT": PART}
    signature = {name: "constexpr" if name in constants
                 else pointers.get(name) or numbers.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(kernel, signature=signature, constexprs=constants)
    options = {"num_warps": WARPS, "num_stages": STAGES}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert ".entry" in compiled.asm["ptx"]
print("done")
"""


def test_compiles_without_a_device() -> None:
    run_script(COMPILED)
