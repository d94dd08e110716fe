"""Which parameter gets which curvature: against SINGD itself, and without a trace."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.modules import module as global_hooks

from tn_kfac import SINGD, summary


class Mixed(nn.Module):
    """A layer of every kind, one of them unused."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, stride=2, groups=2, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.embedding = nn.Embedding(7, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.dropout = nn.Dropout(0.5)
        self.spare = nn.Linear(6, 2)
        self.head = nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images, *, tokens):
        x = self.norm(self.conv(images)).flatten(2).mT + self.embedding(tokens)[:, None]
        return {"logits": self.head(self.dropout(self.attention(x, x, x)[0])) * self.scale}


class Tied(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.embedding(tokens))


def mixed_example():
    return {"images": torch.randn(2, 4, 6, 6), "tokens": torch.tensor([1, 3])}


def by_name(found):
    return {parameter: row for row in found.rows for parameter in row.parameters}


def assert_complete(found, model):
    """Every parameter is in one row, and shares add up."""
    listed = sorted(name for row in found.rows for name in row.parameters)
    assert listed == sorted(name for name, _ in model.named_parameters())
    assert sum(row.size for row in found.rows) == sum(p.numel() for p in model.parameters())
    assert sum(found.shares.values()) == pytest.approx(1.0)


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("structure", ["diagonal", "dense", ("dense", "diagonal")])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_the_summary_is_what_singd_does(norms, structure, approx):
    """The same parameters have factors, of the same sizes; unused ones have no state."""
    model, example = Mixed(), mixed_example()
    options = {"structure": structure, "kfac_approx": approx, "norms": norms}
    found = summary(model, example, **options)
    assert_complete(found, model)
    optimizer = SINGD(model, warn_unsupported=False, **options)
    model(**example)["logits"].square().sum().backward()
    optimizer.step()
    rules = {p: group["rule"] for group in optimizer.param_groups for p in group["params"]}
    rows = by_name(found)
    for name, p in model.named_parameters():
        factored = rows[name].curvature in ("kronecker", "diagonal")
        assert factored == (rules[p] == "singd"), name
    factors = ("K", "C", "m_K", "m_C")
    states = [state[key] for state in optimizer.state.values() for key in factors if key in state]
    assert sum(row.state_bytes for row in found.rows) == sum(s.nbytes for s in states)


def test_kinds_reasons_and_costs():
    model = Mixed()
    rows = by_name(summary(model, mixed_example(), structure="dense"))
    conv = rows["conv.weight"]
    assert conv is rows["conv.bias"]
    assert conv.curvature == "kronecker"
    assert conv.geometry == "Conv2d 4->6, 3x3, stride 2, groups 2"
    assert conv.factors == ((2, 2 * 9 + 1), (2, 3))
    assert "norms=False" in rows["norm.weight"].reason
    assert rows["attention.in_proj_weight"].reason == rows["attention.out_proj.weight"].reason != ""
    assert rows["embedding.weight"].structure == "diagonal, dense"
    assert (rows["scale"].modules, rows["scale"].curvature) == (("",), "fallback")
    spare = rows["spare.weight"]
    assert (spare.lowering, spare.flops, spare.state_bytes) == ("unused", 0, 0)
    head = rows["head.weight"]
    tokens, least = 2 * 9, 2 * 2 * 9 * (6 * 6 + 3 * 3)
    assert head.lowering == "einsum"
    assert least <= head.flops <= least + 4 * tokens * (6 + 3)


@pytest.mark.parametrize(
    ("options", "lowering"),
    [
        ({"structure": "dense"}, "autocorrelation"),
        ({"structure": "dense", "kfac_approx": "reduce"}, "window sum"),
        ({"structure": "diagonal"}, "sum of squares"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_lowerings(options, lowering):
    found = summary(nn.Conv2d(16, 4, 3, padding=1), torch.randn(2, 16, 64, 64), **options)
    assert found.rows[0].lowering == lowering
    assert found.rows[0].flops > 0
    assert lowering in str(found)


def test_a_linear_layer_costs_what_a_backward_pass_of_its_factors_would():
    """Model: 2·n·d·d' forward, the same for the weight's gradient."""
    found = summary(nn.Linear(8, 4, bias=False), torch.randn(5, 8), structure="dense")
    assert found.model_flops == 2 * (2 * 5 * 8 * 4)
    assert found.rows[0].flops == 2 * 5 * (8 * 8 + 4 * 4)


ROW, ROWS = torch.randn(4, 6), torch.randn(4, 5, 6)
TOKENS = torch.zeros(4, 5, dtype=torch.long)


@pytest.mark.parametrize(
    ("module", "example", "flops"),
    [
        (nn.Linear(6, 3), ROWS, 2 * 20 * (6**2 + 3**2) + 20 * 6),
        (nn.LayerNorm(6), ROWS, 8 * 120 + 2 * 4 * 6 * 4),
        (nn.LayerNorm(6, bias=False), ROWS, 7 * 120 + 2 * 4 * 6),
        (nn.Embedding(7, 6), TOKENS, 2 * (20 + 20 * 6 * 6)),
        (nn.EmbeddingBag(7, 6), TOKENS, 2 * (20 + 4 * 6 * 6)),
        (nn.BatchNorm1d(6), ROW, 8 * 24 + 2 * 4 * 6 * 4),
        (nn.GroupNorm(2, 6), ROW, 8 * 24 + 2 * 4 * 6 * 4),
    ],
    ids=lambda value: str(value) if isinstance(value, nn.Module) else None,
)
def test_flops(module, example, flops):
    row = summary(module, example, structure="dense", norms=True).rows[0]
    assert row.flops == flops


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("structure", ["dense", "diagonal"])
@pytest.mark.parametrize(
    ("module", "example"),
    [
        (nn.Conv1d(2, 3, 3, padding="same", padding_mode="circular"), torch.randn(2, 2, 8)),
        (nn.Conv2d(2, 3, 3), torch.randn(2, 8, 8)),
        (nn.ConvTranspose2d(2, 4, 3, stride=2, groups=2, output_padding=1), torch.ones(3, 2, 4, 4)),
        (nn.Linear(3, 2), torch.randn(3)),
        (nn.Embedding(7, 6), TOKENS),
    ],
    ids=lambda value: str(value) if isinstance(value, nn.Module) else None,
)
def test_every_kind_of_layer_has_a_cost(module, example, approx, structure):
    row = summary(module, example, structure=structure, kfac_approx=approx).rows[0]
    assert row.curvature == "kronecker" and row.flops > 0


def test_tied_weights_appear_once():
    model = Tied()
    found = summary(model, torch.tensor([[0, 1], [2, 3]]))
    assert_complete(found, model)
    rows = by_name(found)
    assert rows["embedding.weight"].curvature == "fallback"
    assert "'head'" in rows["embedding.weight"].reason
    assert "'embedding'" in rows["head.bias"].reason


def test_layers_that_share_factors_count_all_calls():
    linear = nn.Linear(3, 3)
    once = summary(nn.Sequential(linear), torch.randn(4, 3))
    model = nn.Sequential(linear, nn.ReLU(), linear)
    twin = nn.Linear(3, 3)
    twin.weight, twin.bias = linear.weight, linear.bias
    shared = summary(nn.Sequential(linear, twin), torch.randn(4, 3))
    assert summary(model, torch.randn(4, 3)).rows[0].flops == 2 * once.rows[0].flops
    assert shared.rows[0].modules == ("0", "1")
    assert shared.rows[0].flops == 2 * once.rows[0].flops


def test_frozen_parameters_have_rows_of_their_own():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].weight.requires_grad_(False)
    model[1].requires_grad_(False)
    found = summary(model, torch.randn(5, 3))
    assert_complete(found, model)
    rows = by_name(found)
    assert rows["0.weight"].curvature == "frozen"
    assert (rows["0.bias"].curvature, rows["0.bias"].factors) == ("kronecker", ((1, 1), (1, 4)))
    assert rows["0.bias"].lowering == "identity"
    assert found.shares["frozen"] == pytest.approx(22 / 26)
    assert "frozen" in str(found)


def hooks(model):
    return [
        {key: len(value) for key, value in vars(m).items() if "hooks" in key}
        for m in model.modules()
    ] + [{key: len(value) for key, value in vars(global_hooks).items() if "_hooks" in key
          and hasattr(value, "__len__")}]  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
def test_nothing_of_the_model_changes(training):
    """Parameters, gradients, buffers, modes, hooks, the example and random numbers."""
    model, example = Mixed().train(training), mixed_example()
    state, given = copy.deepcopy(model.state_dict()), copy.deepcopy(example)
    identities = {name: id(t) for name, t in (*model.named_buffers(), *model.named_parameters())}
    before, seed = hooks(model), torch.random.get_rng_state()
    summary(model, example, norms=True)
    assert torch.equal(torch.random.get_rng_state(), seed)
    assert hooks(model) == before
    assert all(p.grad is None for p in model.parameters())
    assert all(m.training == training for m in model.modules())
    for name, t in (*model.named_buffers(), *model.named_parameters()):
        assert identities[name] == id(t)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    torch.testing.assert_close(example, given, rtol=0, atol=0)


def test_a_failing_model_keeps_no_hooks():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2), nn.Linear(5, 2))
    before, state = hooks(model), copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError):
        summary(model, torch.randn(4, 3))
    assert hooks(model) == before
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


def test_a_running_optimizer_is_not_disturbed():
    """Statistics that it has gathered stay; nothing is measured."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer, x = SINGD(model, T=1), torch.randn(5, 3)
    model(x).square().mean().backward()
    other = copy.deepcopy(model)
    summary(model, torch.randn(5, 3))
    optimizer.step()
    reference = SINGD(other, T=1)
    reference.zero_grad()
    other(x).square().mean().backward()
    reference.step()
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0)


def test_gradient_mode_of_the_caller_does_not_matter():
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    with torch.no_grad():
        first = summary(model, x)
    with torch.inference_mode():
        second = summary(model, torch.randn(4, 3))
    assert first == second == summary(model, (x,))


def test_a_compiled_model_is_run_eagerly():
    model = torch.compile(nn.Sequential(nn.Linear(3, 2)), backend="eager")
    assert summary(model, torch.randn(4, 3)).rows[0].flops > 0


def test_a_layer_past_which_its_weight_is_used():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x):
            return x @ self.inner.weight

    row = summary(Model(), torch.randn(2, 3)).rows[0]
    assert (row.lowering, row.flops) == ("not called", 0)


def test_models_without_gradients_or_parameters():
    assert summary(nn.ReLU(), torch.randn(3)).rows == ()
    frozen = nn.Linear(3, 2).requires_grad_(False)
    assert summary(frozen, torch.randn(1, 3)).shares["frozen"] == 1.0
    assert "total" in str(summary(nn.ReLU(), torch.randn(3)))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "named"),
    [
        ((3, torch.ones(1, 3)), {}, TypeError, "model"),
        ((nn.Linear(3, 2), [1.0]), {}, TypeError, "example_input"),
        ((nn.Linear(3, 2), torch.ones(1, 3)), {"structure": "round"}, ValueError, "structure"),
        ((nn.Linear(3, 2), torch.ones(1, 3)), {"structure": 3}, TypeError, "structure"),
        ((nn.Linear(3, 2), torch.ones(1, 3)), {"kfac_approx": "x"}, ValueError, "kfac_approx"),
        ((nn.Linear(3, 2), torch.ones(1, 3)), {"norms": 1}, TypeError, "norms"),
        ((nn.LazyLinear(2), torch.ones(1, 3)), {}, ValueError, "model"),
    ],
)
def test_bad_input_is_named(arguments, options, error, named):
    with pytest.raises(error, match=named):
        summary(*arguments, **options)
