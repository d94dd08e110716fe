"""scripts/train.py: arrays kept in a file are those that were made, whatever became of the file."""

import numpy as np
import pytest

pytest.importorskip("lightning", reason="lightning is not installed")

from training.cache import cached, folder

MADE = {"a": np.arange(1000), "b": np.ones((2, 3), np.uint8)}


def get(times, **settings):
    def make():
        times.append(settings)
        return dict(MADE)

    found = cached("test", settings, make)
    assert set(found) == set(MADE) and all(np.array_equal(found[k], MADE[k]) for k in MADE)
    return next(folder().glob("test-*.npz"), None)


def test_made_once_for_each_setting():
    times = []
    for size in (1, 1, 2, 2, 1):
        get(times, size=size)
    assert times == [{"size": 1}, {"size": 2}]
    assert not list(folder().glob(".*.part"))


def test_files_that_are_not_whole_are_made_anew():
    times = []
    path = get(times)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    array = whole[: whole.index(b"PK", 4)][whole.index(b"\x93NUMPY") :]  # no zip file but an array
    bad = [whole[: int(share * len(whole))] for share in (0, 0.1, 0.5, 0.99)]
    for number, content in enumerate([*bad, bytes(flipped), array, b"x" * 9], 2):
        path.write_bytes(content)
        get(times)
        assert len(times) == number
        assert path.read_bytes() == whole


def test_without_a_place_to_write_to(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TN_KFAC_CACHE", str(tmp_path / "file" / "cache"))
    times = []
    assert get(times) is get(times) is None and len(times) == 2
