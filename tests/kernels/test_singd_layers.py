"""The kernels' steps on layers of every kind: what they do not do is done as without them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.kernels.interpreted import DEVICE, needs_kernels, run_interpreted
from tn_kfac import SINGD
from tn_kfac.curvature import packed
from tn_kfac.optim import fused


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 6, padding_idx=0), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embedding(x)).mean(1)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(torch.tanh(self.inner(x)))))


def frozen(name: str) -> nn.Module:
    layer = nn.Conv2d(2, 4, 3)
    getattr(layer, name).requires_grad_(False)
    return layer


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d, groups, dilation": (
        lambda: nn.Conv1d(4, 6, 3, padding=2, dilation=2, groups=2),
        (5, 4, 9),
    ),
    "3d": (lambda: nn.Conv3d(2, 3, 2), (3, 2, 4, 4, 4)),
    "3d, one offset": (lambda: nn.Conv3d(2, 3, 1), (3, 2, 4, 4, 4)),
    "circular": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (3, 2, 5, 6)),
    "same": (lambda: nn.Conv2d(2, 3, 3, padding="same"), (3, 2, 5, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (3, 4, 5, 4)),
    "sequences": (lambda: nn.Linear(5, 7), (3, 4, 2, 5)),
    "embedding": (Embedded, (4, 5)),
    "norms": (lambda: nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7)), (5, 4, 5)),
    "bias only": (lambda: frozen("weight"), (5, 2, 5, 6)),
    "weight only": (lambda: frozen("bias"), (5, 2, 5, 6)),
    "called twice": (Twice, (4, 6)),
    "depthwise": (lambda: nn.Conv2d(6, 12, (3, 1), groups=6, stride=(2, 1)), (3, 6, 9, 4)),
    "patches": (lambda: nn.Conv2d(3, 5, 4, stride=4), (3, 3, 9, 8)),
    "one position": (lambda: nn.Conv2d(3, 5, 5), (3, 3, 5, 5)),
    "one sample": (lambda: nn.Conv2d(3, 5, 3), (1, 3, 5, 5)),
}


@needs_kernels
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("name", LAYERS)
def test_layer(name: str, approx: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    model = make().to(DEVICE)
    x = torch.randint(11, shape) if name == "embedding" else torch.randn(shape)
    found: list[list[Tensor]] = []
    for kernels in (False, True):
        twin = copy.deepcopy(model)
        for module in (packed, fused):
            monkeypatch.setattr(module, "available", lambda device, kernels=kernels: kernels)
        optimizer = SINGD(
            twin, T=1, lr=0.05, lr_cov=0.1, kfac_approx=approx, norms=True,
            curvature_fraction=0.5 if name == "norms" else 1,
        )  # fmt: skip
        for _ in range(2):
            optimizer.zero_grad()
            twin(x.to(DEVICE)).square().flatten(1).sum(1).mean().backward()
            optimizer.step()
        states = [optimizer.state[p] for p in twin.parameters()]
        tensors = [v for s in states for _, v in sorted(s.items()) if isinstance(v, Tensor)]
        found.append([*twin.parameters(), *tensors])
    assert len(found[0]) == len(found[1])
    for expected, actual in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_agrees_under_the_interpreter() -> None:
    run_interpreted(__file__)
