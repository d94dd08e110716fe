"""A forward pass under an optimizer saves the storages for backward that a bare one does."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from optimizers import each_optimizer
from torch import Tensor, nn


class Tokens(nn.Module):
    """Norms and linear layers, as in a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 16)
        self.norm = nn.LayerNorm(16)
        self.wide = nn.Linear(16, 32)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.nn.functional.gelu(self.wide(self.norm(self.stem(x)))))


def _freeze(*names: str) -> Callable[[Tokens], None]:
    def change(model: Tokens) -> None:
        for name in names:
            model.get_submodule(name).requires_grad_(False)

    return change


def _freeze_bias(model: Tokens) -> None:
    model.wide.bias.requires_grad_(False)


def _freeze_weight(model: Tokens) -> None:
    model.wide.weight.requires_grad_(False)


CHANGES = {
    "all trained": _freeze(),
    "a frozen layer": _freeze("wide"),
    "a frozen head": _freeze("head"),
    "a frozen stem": _freeze("stem", "norm"),
    "a frozen weight": _freeze_weight,
    "a frozen bias": _freeze_bias,
}
CONTEXTS: dict[str, Callable[[], AbstractContextManager]] = {
    "float32": nullcontext,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


def _saved_bytes(model: nn.Module, x: Tensor, context: AbstractContextManager) -> int:
    """Bytes of the distinct storages that a forward pass saves for backward."""
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), context:
        y = model(x)
    assert y.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


@each_optimizer
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("change", CHANGES)
def test_no_storage_is_saved_on_top(build, change, context):
    """Frozen layers need no input; under autocast layers keep theirs in bfloat16 only."""
    model = Tokens()
    CHANGES[change](model)
    x = torch.randn(32, 8)
    expected = _saved_bytes(model, x, CONTEXTS[context]())
    optimizer = build(model)
    assert _saved_bytes(model, x, CONTEXTS[context]()) <= expected
    with CONTEXTS[context]():
        model(x).float().pow(2).sum().backward()
    factors = {b.site.name: b.tap.factors() for b in optimizer._bindings}
    trained = {
        name
        for name in ("stem", "wide", "head")
        if any(p.requires_grad for p in model.get_submodule(name).parameters())
    }
    assert {name for name, pair in factors.items() if pair is not None} == trained
