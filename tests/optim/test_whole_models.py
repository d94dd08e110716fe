"""Models as people train them: every parameter is handled, and one step is right."""

import re
import warnings

import pytest
import torch
import torchvision
from torch import Tensor, nn

from tn_kfac import SINGD

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


def image_model(build, size: int = 64, dtype: torch.dtype = torch.float32, **options):
    def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
        model = build(num_classes=10, **options).to(dtype)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.02) if not p.any() else None  # heads that start at 0
        return model, (torch.randn(2, 3, size, size, dtype=dtype),)

    return make


def gpt2() -> tuple[nn.Module, tuple[Tensor, ...]]:
    config = transformers.GPT2Config(n_layer=2, n_embd=192, n_head=6, vocab_size=1000)
    return Logits(transformers.GPT2LMHeadModel(config)), (torch.randint(1000, (2, 16)),)


def bert() -> tuple[nn.Module, tuple[Tensor, ...]]:
    config = transformers.BertConfig(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512,
        vocab_size=1000, attn_implementation="eager",
    )  # fmt: skip
    return Logits(transformers.BertForSequenceClassification(config)), (
        torch.randint(1000, (2, 16)),
    )


class Logits(nn.Module):
    """A model of transformers as a function of token numbers to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens).logits


MODELS = {
    "resnet18": image_model(torchvision.models.resnet18),
    "vgg11": image_model(torchvision.models.vgg11, 32, dropout=0.0),
    # Layer scales of 1e-6, and batch statistics of few pixels, move by less than float32 sees.
    "convnext_tiny": image_model(torchvision.models.convnext_tiny, dtype=torch.float64),
    "mobilenet_v2": image_model(torchvision.models.mobilenet_v2, dtype=torch.float64),
    "vit_b_16": image_model(torchvision.models.vit_b_16, 32, image_size=32),
    "gpt2": gpt2,
    "bert": bert,
}
WARNED = {
    "convnext_tiny": "forward pass of its own",
    "vit_b_16": "self_attention.*without calling a layer",
    "gpt2": "shares parameters",
}


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_trained(name, norms):
    """By its factors or by the fallback; a warning names what has no factors, if need be."""
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = SINGD(model, lr=1.0, T=1, damping=0.1, norms=norms)
    said = [str(w.message) for w in caught if "without Kronecker factors" in str(w.message)]
    assert len(said) == (name in WARNED and (norms or name != "convnext_tiny"))
    assert all(re.search(WARNED[name], text) for text in said)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    outputs = model(*inputs)
    (outputs - torch.randn_like(outputs)).square().mean().backward()
    given = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    used = {n for n, gradient in given.items() if gradient.abs().max() > 1e-15}
    optimizer.step()
    after = dict(model.named_parameters())
    assert all(torch.isfinite(p).all() for p in after.values())
    assert used <= {n for n, p in after.items() if not torch.equal(p, before[n])}
    assert len(used) >= 0.9 * len(before)  # batch statistics of few pixels leave no gradient
    held = {p for group in optimizer.param_groups for p in group["params"]}
    assert held == set(model.parameters())
    optimizer.close()


def shares(name: str, norms: bool) -> dict[str, float]:
    """Which share of a model's parameters has which curvature."""
    model, _ = MODELS[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = SINGD(model, norms=norms)
    total = sum(p.numel() for p in model.parameters())
    kinds: dict[str, float] = {"kronecker": 0, "diagonal": 0, "fallback": 0}
    bound = {p: b.site.layer.curvature for b in optimizer._bindings for p in b.parameters}
    for p in model.parameters():
        kinds[bound.get(p, "fallback")] += p.numel() / total
    optimizer.close()
    return kinds


@pytest.mark.parametrize("name", ["resnet18", "convnext_tiny", "mobilenet_v2", "bert"])
def test_nearly_all_parameters_have_curvature(name):
    """All but stray parameters (layer scales of ConvNeXt) have, with norm layers included."""
    found = shares(name, norms=True)
    assert found["fallback"] < 2e-3
    assert found["kronecker"] > 0.95
    assert abs(sum(found.values()) - 1) < 1e-9
