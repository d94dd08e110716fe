"""The benchmark of single layers: what it measures, and the page made from it."""

import json

import pytest
import torch

from benchmarks import layer, table
from benchmarks.convolutions import NETWORKS, PEERS, convolutions
from benchmarks.implementations import make_case
from benchmarks.measure import Cpu, largest_error
from benchmarks.operations import IMPLEMENTATIONS, OPERATIONS, prepare, reference

TINY = ["--quick", "--threads=1", "--seconds=0.001", "--networks", "peers"]
"""The smallest run; the tests add operations and layers."""


def run(tmp_path, *arguments):
    path = tmp_path / "layer.json"
    assert layer.main([*TINY, *arguments, f"--output={path}"]) == 0
    return path, json.loads(path.read_text())


@pytest.mark.filterwarnings("ignore:.*:SyntaxWarning")
def test_run_and_page(tmp_path):
    path, document = run(tmp_path, "--layers=stride 2", "--repeats=2")
    assert document["complete"] and document["note"] == "Complete."
    assert document["settings"]["dtype"] == "float32" and not document["settings"]["tf32"]
    assert torch.__version__.startswith(document["versions"]["torch"])
    assert [e["shape"] for e in document["layers"]] == [[2, 3, 32, 32], [2, 64, 8, 8]]

    rows = document["rows"]
    tried = {(row["operation"], row["implementation"]) for row in rows}
    usual = set(IMPLEMENTATIONS)
    assert tried == {
        (o.name, by) for o in OPERATIONS.values() for by in usual & set(o.implementations())
    }
    assert len(rows) == 2 * len(tried)
    for row in rows:
        assert row["status"] == "ok", row
        assert 0 < row["low"] <= row["seconds"] <= row["high"]
        assert row["max_relative_error"] < 1e-5
        assert row["extra_bytes"] >= 0 and row["limit_seconds"] > 0
        assert ("build_seconds" in row) == (row["implementation"] == "einconv")

    assert table.main([str(path), "--no-plots"]) == 0
    page = path.with_suffix(".md").read_text()
    assert all(f"### {operation}\n" in page for operation in OPERATIONS)
    assert "ResNet18 conv1, 7x7 stride 2" in page
    assert "Not measured" not in page


def test_stops_in_time_and_says_what_is_missing(tmp_path):
    path, document = run(tmp_path, "--max-seconds=1e-9")
    assert not document["complete"] and document["rows"] == []
    assert f"peers {len(PEERS) * len(OPERATIONS)}" in document["note"]
    assert table.main([str(path), "--no-plots"]) == 0
    assert "stopped after --max-seconds" in path.with_suffix(".md").read_text()


def test_what_does_not_fit_is_skipped(tmp_path):
    path, document = run(
        tmp_path, "--layers=patchify", "--operations", "kfac_expand", "--memory-limit=1e-6"
    )
    status = {row["implementation"]: row["status"] for row in document["rows"]}
    assert status["ours"] == "ok"
    assert status["unfold"].startswith("skipped: would need 0.0 GiB")
    assert table.main([str(path)]) == 0
    assert "| kfac_expand | unfold | skipped | 1 |" in path.with_suffix(".md").read_text()
    assert list(tmp_path.glob("*.png")) == []  # nothing to compare ours with


def test_plot(tmp_path):
    path, _ = run(tmp_path, "--layers=patchify", "--operations", "unfold_input", "--no-errors")
    assert table.main([str(path)]) == 0
    assert (tmp_path / "layer-unfold_input.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", NETWORKS)
def test_layers_of_a_network(name):
    layers = convolutions(name)
    assert len(set(layers)) == len(layers)
    network = NETWORKS[name]
    with torch.device("meta"):
        modules = list(network.make().modules())
    assert sum(e.count for e in layers) == sum(isinstance(m, torch.nn.Conv2d) for m in modules)
    assert layers[0].shape == (network.batch, 3, network.pixels, network.pixels)


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=lambda operation: operation.name)
def test_reference_does_not_depend_on_its_parts(operation):
    (grouped,) = [e for e in convolutions("peers", 3, 16) if e.groups > 1]
    case = make_case(grouped, "cpu", torch.float32, torch.contiguous_format)
    whole, parts = reference(operation, case), reference(operation, case, part_bytes=1)
    torch.testing.assert_close(whole, parts)
    assert largest_error(prepare(operation, "ours", case).run(), whole) < 1e-5


def test_extra_memory_counts_what_lives_at_once():
    x = torch.ones(1000)
    assert Cpu().extra_bytes(lambda: x + 1) == 0
    assert Cpu().extra_bytes(lambda: ((x + 1) + 1) + 1) == 4000
    assert Cpu().extra_bytes(lambda: (x + 1).view(10, 100).sum(0)) == 4000
