"""What is remembered from step to step is not used where it no longer holds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.published import PUBLISHED
from tests.kernels.interpreted import DEVICE, needs_kernels, run_interpreted
from tn_kfac import SINGD
from tn_kfac.curvature import packed
from tn_kfac.curvature.packed import KEPT, PackedStatistics
from tn_kfac.curvature.statistics import Recipe, statistics
from tn_kfac.kernels import tables
from tn_kfac.layers import layer_of
from tn_kfac.optim import fused
from tn_kfac.structures import Diagonal


@needs_kernels
@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.parametrize("every", [1, 2])
def test_calls_of_other_shapes(every: int, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pixels that lie in memory as the input does, and padded ones that do not."""
    monkeypatch.setattr(packed, "available", lambda device: True)
    layer = layer_of(nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode))
    spaces = (Diagonal(), Diagonal())
    recipe = Recipe(layer, True, True, "expand", "batch", spaces, every=every)  # pyright: ignore[reportArgumentType]
    remembered = PackedStatistics(recipe, torch.float32)
    for turn in range(2):
        for samples, width, form, dtype, first in (
            (4, 5, torch.contiguous_format, torch.float32, True),
            (4, 5, torch.contiguous_format, torch.float32, False),  # counts no samples
            (4, 5, torch.channels_last, torch.float32, True),
            (4, 5, torch.channels_last, torch.float16, True),
            (3, 5, torch.contiguous_format, torch.float32, True),
            (4, 6, torch.contiguous_format, torch.float32, True),
            (4, 5, torch.contiguous_format, torch.float32, True),
        ):
            x, v = (
                torch.randn(samples, channels, 4, width).to(DEVICE, dtype, memory_format=form)
                for channels in (3, 4)
            )
            found = remembered((x,), v, first, turn)
            parts = statistics(recipe, (x,), v, torch.float32, first, turn=turn)
            (expected,) = recipe.pack(parts)
            assert found is not None
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@needs_kernels
def test_few_sets_of_layers_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that are skipped by chance make ever new sets."""
    monkeypatch.setattr(tables, "KEPT", 6)
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(3, width) for width in range(4, 8)).to(DEVICE)
    optimizer = SINGD(layers, T=1, structure="diagonal", warn_unsupported=False)
    held = optimizer._fused._tables
    for step in range(1, 16):
        optimizer.zero_grad()
        used = [layer for bit, layer in enumerate(layers) if step >> bit & 1]
        sum(layer(torch.randn(2, 3, device=DEVICE)).square().mean() for layer in used).backward()
        optimizer.step()
        assert 0 < len(held._programs) <= 6 and len(held._known) <= 9


@needs_kernels
def test_few_calls_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "available", lambda device: True)
    layer = layer_of(nn.Linear(3, 4))
    spaces = (Diagonal(), Diagonal())
    recipe = Recipe(layer, True, True, "expand", "batch", spaces)  # pyright: ignore[reportArgumentType]
    remembered = PackedStatistics(recipe, torch.float32)
    for samples in range(1, KEPT + 3):
        x, v = torch.randn(samples, 3, device=DEVICE), torch.randn(samples, 4, device=DEVICE)
        found = remembered((x,), v, True, 0)
        assert found is not None
        assert found[-2:].tolist() == [samples, samples]
    assert len(remembered._calls) <= KEPT


class Net(nn.Module):
    """Layers with factors, and a norm and a stray parameter without."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.second, self.head = nn.Conv2d(4, 128, 1), nn.Linear(128, 5)
        self.stray = nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.second(torch.tanh(self.norm(self.first(x)))))
        return self.head(x.mean((2, 3))) * self.stray


def options(**changed: Any) -> Callable[[Net, SINGD], None]:
    def change(net: Net, optimizer: SINGD) -> None:
        for group in optimizer.param_groups:
            group |= {key: value for key, value in changed.items() if key in group}

    return change


def swap(net: Net, optimizer: SINGD) -> None:
    for p in net.parameters():
        p.data = p.data.clone() * 0.9


def last(net: Net, optimizer: SINGD) -> None:
    net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def reload(net: Net, optimizer: SINGD) -> None:
    optimizer.load_state_dict(optimizer.state_dict())


def freeze(net: Net, optimizer: SINGD) -> None:
    for p in (net.first.weight, net.second.bias, net.norm.weight):
        p.requires_grad_(False)


def thaw(net: Net, optimizer: SINGD) -> None:
    for p in net.parameters():
        p.requires_grad_(True)


def forget(net: Net, optimizer: SINGD) -> None:
    for p in (net.head.weight, net.norm.bias):
        optimizer.state[p].pop("momentum_buffer", None)


def replace(net: Net, optimizer: SINGD) -> None:
    state = optimizer.state[net.head.weight]
    state["K"], state["m_C"] = state["K"] * 1.5, state["m_C"].clone()


CHANGES: dict[str, tuple[Callable[[Net, SINGD], None], ...]] = {
    "options": (options(lr=0.02, weight_decay=0.1), options(nesterov=True, damping=0.1)),
    "no momentum": (options(momentum=0.0), options(momentum=0.5)),
    "other options": (options(graft="sgd"), options(graft=None, decoupled_weight_decay=True)),
    "lengths": (options(update_rms=0.2), options(update_rms=None)),
    "what is smoothed": (options(precondition="momentum"), options(precondition="gradient")),
    "parameters": (swap, last),
    "states": (reload, replace),
    "momentum": (forget, reload),
    "frozen": (freeze, thaw),
    "factors": (options(lr_cov=0.05, factor_clip=None), options(kfac_like=True)),
}


@needs_kernels
@pytest.mark.parametrize("rule", [{}, PUBLISHED], ids=["default", "published"])
@pytest.mark.parametrize("name", CHANGES)
def test_changes_between_steps(
    name: str, rule: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = Net().to(DEVICE)
    batches = [torch.randn(4, 3, 4, 5).to(DEVICE) for _ in range(5)]
    found: list[list[Tensor]] = []
    for kernels in (False, True):
        net = copy.deepcopy(model)
        for module in (packed, fused):
            monkeypatch.setattr(module, "available", lambda device, kernels=kernels: kernels)
        chosen = {"T": 1, "lr": 0.05, "lr_cov": 0.1, "weight_decay": 0.01}
        optimizer = SINGD(net, **(rule | chosen))
        for number, x in enumerate(batches):
            if 2 <= number < 2 + len(CHANGES[name]):
                CHANGES[name][number - 2](net, optimizer)
            optimizer.zero_grad()
            net(x).square().sum(1).mean().backward()
            optimizer.step()
        states = [optimizer.state[p] for p in net.parameters()]
        tensors = [v for s in states for _, v in sorted(s.items()) if isinstance(v, Tensor)]
        found.append([*net.parameters(), *tensors])
    assert len(found[0]) == len(found[1])
    for expected, actual in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


@needs_kernels
def test_parameters_without_factors_are_stepped_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[int] = []
    monkeypatch.setattr(packed, "available", lambda device: True)
    monkeypatch.setattr(fused, "available", lambda device: True)
    real = fused.step_parameters
    monkeypatch.setattr(
        fused,
        "step_parameters",
        lambda tables, found: launched.append(len(found.given.tensors)) or real(tables, found),
    )
    net = Net().to(DEVICE)
    optimizer = SINGD(net, fallback="sgd")
    net(torch.randn(4, 3, 4, 5).to(DEVICE)).sum().backward()
    optimizer.step()
    assert sorted(launched) == [3, 5]


def test_agrees_under_the_interpreter() -> None:
    run_interpreted(__file__)
