"""The benchmark on curves: its data, its losses, and a run from beginning to end."""

import json

import pytest
import torch
from torch import nn

from benchmarks.curves import __main__ as command
from benchmarks.curves.data import curves, draw
from benchmarks.curves.network import LOSS, autoencoder, evaluate, squared_error
from benchmarks.curves.optimizers import OPTIMIZERS
from benchmarks.curves.report import page, to_target
from benchmarks.curves.training import Plan


def test_images_are_those_of_the_seed():
    images = curves(50, seed=3)
    assert images.shape == (50, 784) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1
    assert ((images > 0.5).sum(1) >= 3).all()  # each shows something
    assert torch.equal(images, curves(50, seed=3))
    assert not torch.allclose(images, curves(50, seed=4))


def test_a_straight_curve_is_drawn_where_its_points_are():
    points = torch.tensor([[[5.0, 10.0], [14.0, 10.0], [23.0, 10.0]]])
    (image,) = draw(points).view(-1, 28, 28)
    assert (image[10, 6:23] > 0.85).all()
    torch.testing.assert_close(image[9], image[11])
    assert image[:7].max() < 0.01 and image[14:].max() < 0.01 and image[:, :2].max() < 0.01


def test_losses_are_their_formulas():
    images, logits = curves(7, seed=0).double(), torch.randn(7, 784).double()
    p = logits.sigmoid()
    entropy = -(images * p.log() + (1 - images) * (1 - p).log()).sum(1).mean()
    torch.testing.assert_close(LOSS(logits, images), entropy)
    total = nn.BCEWithLogitsLoss(reduction="sum")(logits, images)
    torch.testing.assert_close(LOSS(logits, images), total / 7)
    error = (p - images).square().sum(1).mean()
    torch.testing.assert_close(squared_error(logits, images), error)
    found = evaluate(nn.Identity(), logits, part=3)
    expected = LOSS(logits, logits).item(), squared_error(logits, logits).item()
    assert found == pytest.approx(expected, rel=1e-5)


def test_autoencoder():
    model = autoencoder(seed=0)
    linears = [module for module in model if isinstance(module, nn.Linear)]
    inputs = [784, 400, 200, 100, 50, 25, 6, 25, 50, 100, 200, 400]
    assert [layer.in_features for layer in linears] == inputs
    assert linears[-1].out_features == 784 and model[-1] is linears[-1]
    assert model[list(model).index(linears[5]) + 1] is linears[6]  # the code layer is linear
    for layer in linears:
        assert not layer.bias.any()
        assert ((layer.weight != 0).sum(1) == min(15, layer.in_features)).all()
    same, other = autoencoder(seed=0), autoencoder(seed=1)
    assert torch.equal(same[0].weight, model[0].weight)
    assert not torch.equal(other[0].weight, model[0].weight)


def test_plan():
    plan = Plan(steps=100, warmup=10, evaluations=7)
    rates = [plan.rate(step) for step in range(100)]
    assert max(rates) == rates[9] == 1 and 0 < rates[-1] < 0.02
    assert rates == sorted(rates[:9]) + sorted(rates[9:], reverse=True)
    assert {0, 100} <= plan.evaluated() and len(plan.evaluated()) == 8


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_settings(name):
    entry = OPTIMIZERS[name]
    tried, tuned = list(entry.settings("tune")), list(entry.settings("tuned"))
    assert len(tried) == 16 and len({str(options) for options in tried}) == 16
    assert len(tuned) == 1 and tuned[0] in tried


def test_run_from_beginning_to_end(tmp_path, capsys):
    path = tmp_path / "curves.json"
    asked = ["--quick", "--threads=1", f"--output={path}"]
    assert command.main([*asked, "--optimizers", "SGD", "SINGD diagonal"]) == 0
    assert command.main([*asked, "--seconds=-1"]) == 1  # no time for the others
    assert len(json.loads(path.read_text())["rows"]) == 2
    assert f"{len(OPTIMIZERS) - 2} runs are missing" in capsys.readouterr().err
    assert command.main(asked) == 0
    document = json.loads(path.read_text())
    rows = document["rows"]
    assert {row["optimizer"] for row in rows} == set(OPTIMIZERS) and len(rows) == len(OPTIMIZERS)
    for row in rows:
        assert row["status"] == "ok" and row["steps"] == 6
        steps, seconds, losses, _ = zip(*row["curve"], strict=True)
        assert steps == tuple(range(7)) and list(seconds) == sorted(seconds)
        assert losses[0] == rows[0]["curve"][0][2]  # all start alike
        assert row["test_loss"] > 0 and row["test_error"] > 0
    text = path.with_suffix(".md").read_text()
    assert all(f"\n| {name} | 1 |" in text for name in OPTIMIZERS)
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().err.count("\n") == len(OPTIMIZERS) - 2  # only what was missing
    assert command.main([*asked, "--evaluations=2", "--optimizers", "SGD"]) == 0
    text = path.with_suffix(".md").read_text()  # other plans are other pages
    assert "| SGD | 1 |" in text and "AdamW |" not in text


def test_page_of_runs_that_failed_or_never_met_the_target():
    row = {
        "optimizer": "SGD", "options": {"lr": 1.0}, "seed": 0, "status": "ok", "steps": 2,
        "plan": {"steps": 2, "batch": 1, "warmup": 1, "train": 1, "test": 1, "part": 1},
        "seconds": 0.5, "curve": [[0, 0.0, 9.0, 8.0], [1, 0.25, 7.0, 5.0], [2, 0.5, 6.0, 4.0]],
        "test_loss": 6.5, "test_error": 4.5,
    }  # fmt: skip
    assert to_target(row, 5.5) == (1, 0.25) and to_target(row, 3.0) is None
    bad = row | {"optimizer": "AdamW", "status": "diverged", "curve": row["curve"][:2], "steps": 2}
    del bad["test_error"]
    document = {"rows": [bad, row], "versions": {}, "machine": {"processor": "P", "threads": 1}}
    text = page(document, "plot.png")
    assert "| SGD | 1 | 6 | 4 | 4.5 | 2 | 0.5 | 250 | 1.00 |" in text
    assert "| AdamW | 1, 1 diverged | 7 | 5 | - | never | never | 250 | 1.00 |" in text
