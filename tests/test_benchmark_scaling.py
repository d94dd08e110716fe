"""The script that predicts what ranks take."""

import json

from benchmarks import scaling


def test_page(tmp_path):
    """Rows of every optimizer and number of ranks; ranks that take the same are one line."""
    output = tmp_path / "scaling.json"
    scaling.main(["--models", "ResNet50", "--ranks", "1", "2", "4", "--output", str(output)])
    rows = json.loads(output.read_text())["rows"]
    assert len(rows) == 3 * len(scaling.OPTIMIZERS)
    assert {row["parameters"] for row in rows} == {25557032}
    page = output.with_suffix(".md").read_text()
    assert "| SINGD diagonal | 2 to 4 | 0.0315 MiB | - | 0.629 MiB | - | - | - |" in page
    assert "| KFAC, inverses sent | 2 | 58.7 MiB | 5.87 MiB |" in page
