"""All layers in one launch, all parameters in another: the kernels by SINGD's plain steps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.kernels.interpreted import DEVICE, needs_kernels, run_interpreted, run_script
from tn_kfac import SINGD
from tn_kfac.curvature import packed
from tn_kfac.optim import fused

LENGTHS = ({"update_rms": None}, {"update_rms": 0.2}, {"update_rms": None, "graft": "sgd"})
"""Of updates; the last is none of the kernels'."""


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    """Of a run in which rounding stays small."""
    momentum = draw(st.sampled_from((0.0, 0.9)))
    return {
        "lr": 1e-2,
        "momentum": momentum,
        "damping": draw(st.sampled_from((1e-3, 0.1))),
        "alpha1": draw(st.sampled_from((0.0, 0.5))),
        "weight_decay": draw(st.sampled_from((0.0, 0.1))),
        "T": draw(st.sampled_from((1, 2))),
        "loss_average": draw(st.sampled_from(("batch", None))),
        "lr_cov": draw(st.sampled_from((1e-2, lambda step: 0.1 / (step + 1)))),
        "kfac_approx": draw(st.sampled_from(("expand", "reduce"))),
        "kfac_like": draw(st.booleans()),
        "normalize_lr_cov": draw(st.booleans()),
        "nesterov": momentum > 0 and draw(st.booleans()),
        "decoupled_weight_decay": draw(st.booleans()),
        "exponent": draw(st.sampled_from((1, 0.5))),
        "warmup": draw(st.sampled_from((0, 2))),
        "factor_clip": draw(st.sampled_from((None, 0.9))),
        "curvature_fraction": draw(st.sampled_from((1, 0.5))),
        "precondition": draw(st.sampled_from(("gradient", "momentum"))),
        "average_momentum": draw(st.booleans()),
        **draw(st.sampled_from(LENGTHS)),
        "fallback": draw(st.sampled_from(("sgd", "adamw"))),
    }


def network() -> nn.Module:
    """Convolutions with strides, groups, one offset and no bias; linear layers."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, stride=2, groups=2),
        nn.ReLU(), nn.Conv2d(6, 7, 1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(7 * 4, 5),
    )  # fmt: skip


def train(model: nn.Module, given: dict[str, Any], kernels: bool, batches: list[Any],
          monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:  # fmt: skip
    """All that a few steps leave, with kernels or without."""
    with monkeypatch.context() as patch:
        launched = []
        for module in (packed, fused):
            patch.setattr(module, "available", lambda device: kernels)
        for name in ("update_factors", "sum_squares", "set_lengths", "step_parameters"):
            real = getattr(fused, name)
            patch.setattr(
                fused, name, lambda *a, real=real, name=name: launched.append(name) or real(*a)
            )
        optimizer = SINGD(model, **given)
        for x, y in batches:
            optimizer.zero_grad()
            reduction = "sum" if given.get("loss_average", "batch") is None else "mean"
            nn.functional.cross_entropy(model(x).float(), y, reduction=reduction).backward()
            optimizer.step()
        assert ("update_factors" in launched) == kernels
        stepped = kernels and given.get("graft") is None
        assert ("step_parameters" in launched) == stepped
        for name in ("sum_squares", "set_lengths"):
            assert (name in launched) == (stepped and given.get("update_rms", 0.2) is not None)
    found = {name: p.detach() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        tensors = {k: v for k, v in optimizer.state[p].items() if isinstance(v, Tensor)}
        found |= {f"{name}.{key}": value for key, value in tensors.items()}
    return found


def compare(model: nn.Module, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch,
            tolerance: float) -> None:  # fmt: skip
    dtype = next(model.parameters()).dtype
    batches = [
        (torch.randn(6, 3, 6, 6).to(DEVICE, dtype), torch.randint(5, (6,), device=DEVICE))
        for _ in range(3)
    ]
    plain = train(copy.deepcopy(model), given, False, batches, monkeypatch)
    found = train(model, given, True, batches, monkeypatch)
    assert plain.keys() == found.keys()
    for name, expected in plain.items():
        scale = expected.abs().max().clamp(min=1e-3)
        difference = (found[name] - expected).abs().max() / scale
        least = tolerance if expected.dtype == dtype else 2e-3  # factors stay in float32
        assert difference < least, (name, difference.item())


@needs_kernels
@settings(max_examples=8)
@given(given=options(), last=st.booleans())
def test_kernels_are_the_plain_step(given: dict[str, Any], last: bool) -> None:
    torch.manual_seed(0)
    form = torch.channels_last if last else torch.contiguous_format
    model = network().to(DEVICE).to(memory_format=form)
    with pytest.MonkeyPatch.context() as monkeypatch:
        compare(model, given, monkeypatch, 2e-4)


@needs_kernels
@pytest.mark.parametrize("fisher", ["forward-only", "mc", "type-2"])
def test_other_fishers(fisher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`forward-only` has no G to measure, so its factors are not updated by the kernel."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)).to(DEVICE)
    x, y = torch.randn(4, 3, 6, 6, device=DEVICE), torch.randint(5, (4,), device=DEVICE)
    found = []
    for kernels in (False, True):
        twin = copy.deepcopy(model)
        for module in (packed, fused):
            monkeypatch.setattr(module, "available", lambda device, kernels=kernels: kernels)
        optimizer = SINGD(twin, fisher=fisher, T=1, lr_cov=0.1)
        for seed in range(2):
            optimizer.zero_grad()
            outputs = twin(x)
            generator = torch.Generator(DEVICE).manual_seed(seed)
            optimizer.curvature(outputs, "cross_entropy", y, generator=generator)
            nn.functional.cross_entropy(outputs, y).backward()
            optimizer.step()
        found.append([*twin.parameters(), *(s["C"] for s in optimizer.state.values() if "C" in s)])
    for expected, actual in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@needs_kernels
def test_weights_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded once a step instead of after each operation (the interpreter cuts off instead)."""
    model = network().to(DEVICE, torch.bfloat16)
    compare(model, {"T": 1, "lr": 1e-2}, monkeypatch, 0.1)


@needs_kernels
def test_what_is_not_finite_is_no_update(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network().to(DEVICE)
    batches = [(torch.randn(6, 3, 6, 6), torch.randint(5, (6,))) for _ in range(2)]
    batches[1][0][0, 0, 0, 0] = float("nan")
    batches = [(x.to(DEVICE), y.to(DEVICE)) for x, y in batches]
    found = train(model, {"T": 1}, True, batches, monkeypatch)
    factors = [v for k, v in found.items() if k.endswith((".K", ".C", ".m_K", ".m_C"))]
    assert factors
    assert all(factor.isfinite().all() for factor in factors)
    assert all((factor != 1).any() for factor in factors[::2])


@needs_kernels
def test_no_gradient_is_no_update(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 5)).to(DEVICE)
    before = [p.detach().clone() for p in model.parameters()]
    for module in (packed, fused):
        monkeypatch.setattr(module, "available", lambda device: True)
    optimizer = SINGD(model)
    for _ in range(2):
        optimizer.zero_grad()
        (model(torch.randn(6, 3, 6, 6, device=DEVICE)).sum() * 0).backward()
        optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))


def test_agrees_under_the_interpreter() -> None:
    run_interpreted(__file__)


COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton.language as tl
from tn_kfac.kernels.singd_triton import (
    set_lengths, step_parameters, sum_squares, update_factors
)
flags = {"TERMS": 1, "SCALED": True, "IKFAC": False, "NORMALISED": False, "LIMITED": True,
         "MOMENTUM": True, "BLOCK": 1024}
squares = {"KIND": tl.bfloat16, "MOMENTUM": True, "NESTEROV": True, "ROOT": False, "FIRST": True,
           "BLOCK_R": 32, "BLOCK_C": 128}
new, kept = {"SMOOTHED": True, "LENGTHS": True}, {"SMOOTHED": False, "LENGTHS": False}
pointers = {"table": "*i64", "programs": "*i32", "loss_scale": "*fp32"}
for kernel, constants in (
    (update_factors, flags), (sum_squares, squares), (set_lengths, {"BLOCK": 1024}),
    (step_parameters, squares | new), (step_parameters, squares | kept),
    (step_parameters, squares | kept | {"FIRST": False}),
):
    signature = {name: "constexpr" if name in constants else pointers.get(name, "fp32")
                 for name in kernel.arg_names}
    source = ASTSource(kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert ".entry" in compiled.asm["ptx"]
print("done")
"""


def test_compiles_without_a_device() -> None:
    run_script(COMPILED)
