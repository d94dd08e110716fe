"""The benchmark of several ranks, on two processes without GPUs."""

import json

import pytest

from benchmarks import ranks


def test_two_ranks(tmp_path):
    """All rows; what was sent is what was predicted; shards learn what replicas do."""
    pytest.importorskip("timm", reason="timm is not installed")
    output = tmp_path / "ranks.json"
    ranks.main(["--device", "cpu", "--ranks", "1", "2", "--model", "tiny", "--batch", "4",
                "--pixels", "12", "--steps", "2", "--optimizers", "SGD foreach", "SINGD",
                "SINGD dense T=10", "--output", str(output)])  # fmt: skip
    document = json.loads(output.read_text())
    assert [row["ranks"] for row in document["rows"]] == [1, 1, 1, 2, 2, 2]
    for row in document["rows"][4:]:
        assert row["sent"] == pytest.approx(row["predicted"])
    lessons = document["lessons"]["2"]
    assert lessons["fsdp"] == pytest.approx(lessons["ddp"], rel=1e-5)
    assert lessons["ddp"][-1] < lessons["ddp"][0]
    assert "| SINGD | 2 |" in output.with_suffix(".md").read_text()


@pytest.mark.parametrize("wrong", [["--ranks", "0"], ["--steps", "x"], ["--output", "/no/x.json"]])
def test_refused(wrong, capsys):
    """By the name of the argument."""
    with pytest.raises(SystemExit):
        ranks.main(["--device", "cpu", *wrong])
    assert f"{wrong[0]}" in capsys.readouterr().err
