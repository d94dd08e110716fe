"""Models of many kinds train: every parameter moves, the loss falls, nothing crashes."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from optimizers import (
    REFUSED,
    changed,
    copied,
    each_optimizer,
    factors_of,
    first_factor,
    is_fresh,
    train,
)
from reference.networks import DigitNet
from torch import Tensor, nn
from torch.nn.utils import parametrizations


class Head(nn.Module):
    """What is left of (batch, tokens, width) becomes ten logits."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mean(1))


class Attention(nn.Module):
    """Bare multi-head attention over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x, need_weights=False)[0]


class Recurrent(nn.Module):
    """The last output of an LSTM over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0][:, -1:]


class Tokens(nn.Module):
    """The brightness of the pixels in a row of an image, as one of 17 tokens each."""

    def forward(self, x: Tensor) -> Tensor:
        return (16 * x[:, 0, 3]).long()


def _rows() -> nn.Module:
    return nn.Flatten(1, 2)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "convolutions": DigitNet,
    "convolutions without bias": lambda: DigitNet(bias=False),
    "transformer layer": lambda: nn.Sequential(
        _rows(), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0), Head(8)
    ),
    "attention": lambda: nn.Sequential(_rows(), Attention(), Head(8)),
    "lstm": lambda: nn.Sequential(_rows(), Recurrent(), Head(6)),
    "norms": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, groups=2),
        nn.GroupNorm(2, 4), nn.ReLU(inplace=True), nn.Flatten(2), nn.LayerNorm(16), Head(16),
    ),
    "embeddings": lambda: nn.Sequential(Tokens(), nn.Embedding(17, 6), nn.Tanh(), Head(6)),
    "bag of embeddings": lambda: nn.Sequential(
        Tokens(), nn.EmbeddingBag(17, 6), nn.Tanh(), nn.Linear(6, 10)
    ),
    "other convolutions": lambda: nn.Sequential(
        nn.ConvTranspose2d(1, 2, 2), nn.Tanh(), nn.Flatten(2), nn.Conv1d(2, 4, 3, stride=4),
        nn.Tanh(), Head(20),
    ),
    "weight norm": lambda: nn.Sequential(
        nn.Flatten(), parametrizations.weight_norm(nn.Linear(64, 8)), nn.Tanh(), nn.Linear(8, 10)
    ),
    "spectral norm": lambda: nn.Sequential(
        nn.Flatten(), parametrizations.spectral_norm(nn.Linear(64, 8)), nn.Tanh(), nn.Linear(8, 10)
    ),
    "prelu": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.PReLU(8), nn.Linear(8, 10)),
}  # fmt: skip

# Modules of a known kind that have no factors all the same: their users are told.
WARNINGS = {
    "transformer layer": r"'1\.self_attn' computes its projections without calling a layer$",
    "attention": r"'1\.attention' computes its projections without calling a layer$",
    "weight norm": "'1' has parametrised weights$",
    "spectral norm": "'1' has parametrised weights$",
}

SAME_BATCH = [0] * 30  # so that the loss must fall

# Exactly zero gradient by construction: attention does not see a shift of all its keys, and a
# bias before a norm over the same axis is subtracted again.
UNMOVED = {
    "norms": {"0.bias", "3.bias"},
}


def _warned(name: str) -> AbstractContextManager[Any]:
    """Expects what is said of a model when its optimizer is built (warnings are errors here)."""
    if name not in WARNINGS:
        return nullcontext()
    return pytest.warns(UserWarning, match=REFUSED + WARNINGS[name])


@each_optimizer
@pytest.mark.parametrize("fallback", ["sgd", "adamw"])
@pytest.mark.parametrize("name", MODELS)
def test_model_trains(digits, build, fallback, name):
    """Losses stay finite and fall, every parameter moves, and Linears get factors."""
    model = MODELS[name]()
    with _warned(name):
        optimizer = build(model, fallback=fallback, lr=0.02 * build.pace, fallback_lr=0.02)
    before = copied(model)
    losses = train(model, optimizer, digits, SAME_BATCH)
    assert losses[-1] < 0.9 * losses[0]
    assert changed(model, before) >= set(before) - UNMOVED.get(name, set())
    *_, last = (m for m in model.modules() if isinstance(m, nn.Linear))
    assert not is_fresh(first_factor(optimizer.state[last.weight]))


@each_optimizer
def test_attention_projections_follow_the_fallback(digits, build):
    """out_proj is a Linear whose hooks never fire; it must not wait for statistics."""
    model = nn.Sequential(_rows(), Attention(), Head(8))
    with _warned("attention") as caught:
        optimizer = build(model, fallback="adamw")
    assert len(caught) == 1
    assert caught[0].filename == build.__call__.__code__.co_filename, (
        "the warning points at the caller"
    )
    rules = {p: group["rule"] for group in optimizer.param_groups for p in group["params"]}
    attention = model[1].attention
    assert {rules[p] for p in attention.parameters()} == {"adamw"}
    assert {rules[p] for p in model[2].parameters()} == {build.kind.rule}
    before = copied(model)
    train(model, optimizer, digits, range(3))
    assert "1.attention.out_proj.weight" in changed(model, before)


@each_optimizer
@pytest.mark.parametrize("name", WARNINGS)
def test_refused_modules_need_no_warning_when_not_wanted(build, name):
    """warn_unsupported=False is silent (warnings are errors here)."""
    model = MODELS[name]()
    optimizer = build(model, fallback="sgd", warn_unsupported=False)
    assert {group["rule"] for group in optimizer.param_groups} == {build.kind.rule, "sgd"}


@each_optimizer
@pytest.mark.parametrize("name", ["embeddings", "bag of embeddings"])
def test_embeddings_have_factors(digits, build, name):
    """K is the diagonal over the tokens, whatever the structure, and follows their counts."""
    model = MODELS[name]()
    optimizer = build(model)
    assert [group["rule"] for group in optimizer.param_groups] == [build.kind.rule]
    before = copied(model)
    train(model, optimizer, digits, range(3))
    assert changed(model, before) == set(before)
    K, C = factors_of(optimizer.state[model[1].weight])
    assert K.shape == (1, 17)
    assert C.shape[:2] == (1, 6)
    assert not is_fresh(K)
    assert not is_fresh(C)


@each_optimizer
@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_layer_with_a_frozen_parameter(digits, build, frozen):
    """The other one trains, with factors of the size that it needs."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    getattr(model[1], frozen).requires_grad_(False)
    optimizer = build(model, lr=0.05 * build.pace)
    before = copied(model)
    losses = train(model, optimizer, digits, SAME_BATCH)
    trained = "bias" if frozen == "weight" else "weight"
    assert changed(model, before) == {f"1.{trained}"}
    assert losses[-1] < 0.9 * losses[0]
    K = first_factor(optimizer.state[getattr(model[1], trained)])
    assert K.shape[-1] == {"bias": 1, "weight": 64}[trained]


@each_optimizer
def test_trained_weight_beside_a_bias_in_no_group(digits, build):
    """Only the weight is given: its bias is neither trained nor part of the factor."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    optimizer = build(model, [model[1].weight])
    before = copied(model)
    train(model, optimizer, digits, range(3))
    assert changed(model, before) == {"1.weight"}
    assert first_factor(optimizer.state[model[1].weight]).shape[-1] == 64


@each_optimizer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_model_that_changes_dtype_after_construction(digits, build, dtype):
    """model.to(dtype) replaces every storage; the optimizer goes on training it."""
    model = DigitNet()
    optimizer = build(model, lr=0.02 * build.pace)
    model.to(dtype)
    before = copied(model)
    losses = train(model, optimizer, digits, SAME_BATCH)
    assert changed(model, before) == set(before)
    assert losses[-1] < 0.9 * losses[0]
    assert all(p.dtype == dtype for p in model.parameters())


@each_optimizer
def test_memory_format_does_not_matter(digits, build):
    """channels_last weights take the same steps, and stay channels_last."""
    model = DigitNet().double()
    twin = DigitNet().double()
    twin.load_state_dict(model.state_dict())
    twin.to(memory_format=torch.channels_last)
    expected = train(model, build(model), digits, range(5))
    assert train(twin, build(twin), digits, range(5)) == pytest.approx(expected, rel=1e-9)
    assert twin.conv.weight.is_contiguous(memory_format=torch.channels_last)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


@each_optimizer
def test_what_is_not_trained_is_not_warned_of(build):
    """A frozen attention, or one that is in no group, is nobody's concern; a tie is told once."""
    model = nn.ModuleDict({"a": nn.MultiheadAttention(4, 2), "h": nn.Linear(4, 2)})
    build(model, model.h.parameters()).close()
    model.a.requires_grad_(False)
    build(model).close()
    tied = nn.ModuleDict({"e": nn.Embedding(4, 3), "h": nn.Linear(3, 4, bias=False)})
    tied.h.weight = tied.e.weight
    with pytest.warns(UserWarning, match="shares parameters") as caught:
        build(tied).close()
    assert len(caught) == 1 and str(caught[0].message).count("shares") == 1
