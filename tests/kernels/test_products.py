"""Sums of half-precision tensors in float32: as exact as if the tensors were float32."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tn_kfac.kernels import products
from tn_kfac.kernels.products import HALF, multiplied, parted, product
from tn_kfac.layers import layer_of
from tn_kfac.layers.base import Ask

GPU = pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU"))  # fmt: skip
on_devices = pytest.mark.parametrize("device", ["cpu", GPU])
CONVOLUTIONS = {
    "autocorrelation": (torch.nn.Conv2d(8, 4, 3, padding=1), (4, 8, 20, 20)),
    "autocorrelation of few channels": (torch.nn.Conv2d(3, 4, 3), (2, 3, 40, 40)),
    "windows": (torch.nn.Conv2d(6, 4, 3, stride=2, padding=1), (5, 6, 9, 9)),
    "groups": (torch.nn.Conv2d(8, 4, 3, padding=1, groups=2), (4, 8, 20, 20)),
    "one pixel": (torch.nn.Conv2d(8, 4, 1), (3, 8, 7, 7)),
    "one axis": (torch.nn.Conv1d(4, 6, 5, padding=2, padding_mode="circular"), (3, 4, 30)),
    "linear": (torch.nn.Linear(8, 5), (6, 3, 8)),
}


@on_devices
@given(
    batch=st.integers(1, 3), rows=st.integers(1, 9), inner=st.integers(1, 300),
    columns=st.integers(1, 9), dtype=st.sampled_from(HALF), flat=st.booleans(),
)  # fmt: skip
def test_products_of_halves_are_summed_in_float32(device, batch, rows, inner, columns, dtype, flat):
    torch.manual_seed(rows)
    left = torch.randn(batch, inner, rows, device=device, dtype=dtype).mT
    right = torch.randn(batch, inner, columns, device=device, dtype=dtype)
    left, right = (left[0], right[0]) if flat else (left, right)
    found = multiplied(left, right, torch.float32)
    assert found.dtype == torch.float32
    bound = 2e-6 * (left.double().abs() @ right.double().abs())
    assert ((found.double() - left.double() @ right.double()).abs() <= bound).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_long_sums_lose_as_little_as_is_said():
    rows = torch.randn(25_000, 512, device="cuda", dtype=torch.bfloat16)
    found = multiplied(rows.mT, rows, torch.float32).diagonal().double()
    assert (found / rows.double().square().sum(0) - 1).abs().max() <= 1e-4


@on_devices
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_factors_of_halves_are_those_of_the_same_numbers_in_float64(case, approx, dtype, device):
    module, shape = CONVOLUTIONS[case]
    layer = layer_of(module)
    torch.manual_seed(0)
    x = torch.randn(shape).to(device, dtype)
    v = torch.randn(module(torch.zeros(shape)).shape).to(device, dtype)
    asks = [Ask(approx, dtype=kind) for kind in (torch.float32, torch.float64)]
    exact = (x.double(),), v.double()
    pairs = [
        (
            layer.input_factor((x,), v.shape, asks[0]),
            layer.input_factor(exact[0], v.shape, asks[1]),
        ),
        (layer.input_total((x,), v.shape, asks[0]), layer.input_total(exact[0], v.shape, asks[1])),
        (layer.gradient_factor((x,), v, asks[0]), layer.gradient_factor(*exact, asks[1])),
    ]
    for found, expected in pairs:
        assert found.dtype == torch.float32
        tolerance = 4e-6 if device == "cpu" else 2e-5  # tensor cores cut sums off
        assert (found.double() - expected).abs().max() <= tolerance * expected.abs().max()


@on_devices
@given(
    batch=st.integers(0, 3), rows=st.integers(1, 9), inner=st.integers(1, 300),
    columns=st.integers(1, 9), spread=st.integers(0, 20), seed=st.integers(0, 99),
)  # fmt: skip
def test_products_of_parts_are_as_exact_as_is_said(
    device, batch, rows, inner, columns, spread, seed
):
    """Whatever the sizes of entries, whose exponents bfloat16 shares with float32."""
    torch.manual_seed(seed)
    shapes = (rows, inner), (inner, columns)
    left, right = (
        (torch.randn(batch, *shape) if batch else torch.randn(shape)).to(device) for shape in shapes
    )
    left = left * 10.0 ** torch.randint(-spread, spread + 1, left.shape, device=device)
    found = parted(left, right)
    assert found.dtype == torch.float32
    bound = 4e-5 * (left.double().abs() @ right.double().abs())
    assert ((found.double() - left.double() @ right.double()).abs() <= bound).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("batch", [None, 3])
def test_large_products_on_a_gpu_are_those_of_parts(batch):
    shape = (2048, 2048) if batch is None else (batch, 1024, 1024)
    left, right = (torch.randn(shape, device="cuda") for _ in range(2))
    found = product(left.mT, right)
    assert torch.equal(found, parted(left.mT, right))
    bound = 4e-5 * (left.mT.double().abs() @ right.double().abs())
    assert ((found.double() - left.mT.double() @ right.double()).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float32])
def test_other_products_are_plain(monkeypatch, dtype):
    """Of float64 and on a CPU, however large."""
    monkeypatch.setattr(products, "LARGE", 1)
    left, right = (torch.randn(130, 130, dtype=dtype) for _ in range(2))
    assert torch.equal(product(left, right), left @ right)
