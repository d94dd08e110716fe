"""Little data and a tiny workload."""

import pytest

from benchmarks.time_to_target import data, networks, protocol, training
from benchmarks.time_to_target.workloads import WORKLOADS, Size, Workload

TINY = Size(12, 32, 100, {"width": 2}, 0.1, evaluations=4)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Little data of each kind."""
    path = tmp_path_factory.mktemp("data") / "data.npz"
    data.prepare(path, counts=(96, 60), text_bytes=4000)
    return path


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    tiny = Workload("digits", networks.digits_cnn, "loss", {"small": TINY})
    monkeypatch.setitem(WORKLOADS, "tiny", tiny)
    monkeypatch.setattr(protocol, "rehearse", lambda *_: None)
    monkeypatch.setattr(training, "release", lambda: None)  # collecting takes longer than a run
    data.load.cache_clear()
    protocol._task.cache_clear()


@pytest.fixture
def asked(tmp_path, file, monkeypatch):
    """Arguments of a short run; what Optuna would suggest is the numbers' own."""

    def suggested(space, told, number, horizon):
        low = {key: least for key, (least, _) in space.ranges().items()}
        return low | {"lr": 0.01 * (1 + number), "horizon": horizon or 0.9}

    monkeypatch.setattr(protocol, "suggest", suggested)
    return [
        "--small", "--device=cpu", "--workloads", "tiny", "--trials=3", "--seeds=2",
        f"--data={file}", f"--targets={tmp_path / 'targets.json'}",
        f"--output={tmp_path / 'rows.jsonl'}",
    ]  # fmt: skip
