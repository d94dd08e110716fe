"""How a summary reads: plain, through rich, and for a model of many layers."""

import sys

import pytest
import torch
from test_summary import assert_complete
from torch import nn

from tn_kfac import Summary, summary
from tn_kfac.summary.table import merged


def test_repeated_layers_of_resnet18_share_a_line():
    """Repeated layers share a line."""
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.resnet18()
    found = summary(model, torch.randn(2, 3, 64, 64), structure="dense")
    text = str(found)
    assert_complete(found, model)
    assert "layer1.[0-1].conv[1-2] ×4" in text
    assert len(text.splitlines()) < 30 < len(found.rows)
    assert text.splitlines()[-1].startswith("total: 11,689,512 parameters (99.9% Kronecker")


def test_str_is_aligned_and_narrow():
    deep = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(100)))
    model = nn.ModuleDict({"a_name_that_is_far_too_long_to_be_readable_in_a_table": deep})
    model.forward = deep.forward
    head, rule, line, total = str(summary(model, torch.randn(2, 4))).splitlines()
    assert "×100" in line and "…" in line
    assert len(rule) >= len(line) and head.startswith("layer")
    assert total.startswith("total: 2,000 parameters")


def test_merged_names():
    assert merged(["a.0.b1", "a.2.b1", "a.1.b1"]) == "a.[0-2].b1"
    assert merged(["a.0", "a.3"]) == "a.*"
    assert merged(["head"]) == "head"


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("installed", [True, False])
def test_print(capsys, monkeypatch, terminal, installed):
    """Through rich in a terminal; the plain text in a file, or where rich is missing."""
    if installed:
        pytest.importorskip("rich")
    else:
        for name in ("rich", "rich.box", "rich.console", "rich.table"):
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setenv("TTY_COMPATIBLE", "1" if terminal else "0")
    monkeypatch.setenv("COLUMNS", "160")
    found = summary(nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)), torch.randn(4, 3))
    assert isinstance(found, Summary)
    found.print()
    printed = capsys.readouterr().out
    assert "Linear 3->2" in printed and "LayerNorm 2" in printed
    assert (printed == f"{found}\n") == (not (terminal and installed))
