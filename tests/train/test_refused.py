"""scripts/train.py: what is said of wrong configurations, data and checkpoints, in one line."""

import sys
import zipfile

import pytest
import torch

from tests.train.common import QUIETLY, folder, optimizer

pytest.importorskip("lightning", reason="lightning is not installed")

pytestmark = QUIETLY


def one_line(capsys, named):
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("train.py: error: ")]
    assert len(lines) == 1 and named in lines[0], error
    return lines[0]


LAYOUTS = {
    "is no folder": [],
    "train'": ["other/a/1.png"],
    "val'": ["train/a/1.png"],
    "no class folder": ["train/1.png", "val/1.png"],
    "1 classes in only one of train and val (b)": ["train/a/1.png", "train/b/1.png", "val/a/1.png"],
}


@pytest.mark.parametrize("named", LAYOUTS)
def test_malformed_folder_is_one_line(named, run, tmp_path, capsys):
    assert run("fit", data=folder(tmp_path / "images", *LAYOUTS[named])) == 2
    line = one_line(capsys, named)
    assert "expected ROOT/train/CLASS/IMAGE.jpg" in line and "Union" not in line


def test_class_without_images_is_one_line(run, tmp_path, capsys):
    data = folder(tmp_path / "images", "train/a/1.png", "val/a/1.png")
    (tmp_path / "images" / "train" / "a" / "1.png").rename(tmp_path / "images/train/a/1.txt")
    assert run("fit", "--data.batch_size=1", data=data) == 2
    one_line(capsys, "expected ROOT/train")


BAD = {
    "unknown key": (["--model.depth=3"], "model.depth"),
    "unknown optimizer": (["--model.optimizer.name=Adam"], "model.optimizer.name"),
    "unknown option": (["--model.optimizer.options={lr: 1, speed: 2}"], "speed"),
    "bad option": (
        [*optimizer("SINGD")[:1], "--model.optimizer.options={structure: round}"],
        "round",
    ),
    "unknown library": (["--model.name=resnet18"], "LIBRARY/NAME"),
    "unknown model": (["--model.name=torchvision/resnet19"], "resnet18"),
    "unknown network option": (["--model.options.heads=3"], "heads"),
    "no Muon matrix": ([*optimizer("Muon")], "AdamW"),
    "warm-up": (["--model.schedule.warmup_fraction=1"], "schedule.warmup_fraction"),
    "milestones": (["--model.schedule.milestones=[30]"], "schedule.milestones"),
    "batch too large": (["--data.batch_size=5000"], "data.batch_size"),
    "checkpoint interval": (["--checkpoint.every_n_steps=0"], "checkpoint.every_n_steps"),
    "no checkpoint": (["--ckpt_path=absent.ckpt"], "absent.ckpt"),
    "no configuration": (["--config=absent.yaml"], "absent.yaml"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_configuration_is_one_line(case, run, capsys):
    arguments, named = BAD[case]
    assert run("fit", *arguments) == 2
    one_line(capsys, named)


def test_absent_timm_is_one_line(run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert run("fit", "--model.name=timm/vit_small_patch16_224") == 2
    one_line(capsys, "pip install timm")


def test_refused_checkpoints(run, tmp_path, capsys):
    assert run("fit", "--trainer.limit_train_batches=2") == 0
    good = tmp_path / "run" / "checkpoints" / "last.ckpt"
    whole, path = good.read_bytes(), tmp_path / "other.ckpt"
    with zipfile.ZipFile(good) as file:
        largest = max(file.infolist(), key=lambda member: member.file_size)
    flipped = bytearray(whole)
    flipped[largest.header_offset + largest.file_size // 2 + 64] ^= 64  # within a tensor
    for bad in (
        b"",
        b"not a zip file",
        *(whole[: len(whole) * n // 100] for n in (10, 99)),
        flipped,
    ):
        path.write_bytes(bad)
        assert run("fit", f"--ckpt_path={path}", folder="new") == 2
        one_line(capsys, "is truncated or damaged, or no checkpoint")
    torch.save({"state_dict": {}}, path)
    assert run("fit", f"--ckpt_path={path}", folder="new") == 2
    one_line(capsys, "was not written by train.py")
    resume = f"--ckpt_path={good}"
    for change, named in {
        "--model.options.width=4": "other sizes",
        "--model.name=small/mlp": "'small/cnn'",
        "--model.optimizer={name: AdamW, options: {lr: 0.01}}": "optimizer 'SGD'",
        "--data.batch_size=32": "written with 64",
    }.items():
        assert run("fit", resume, change, "--trainer.max_epochs=2", folder="new") == 2
        one_line(capsys, named)
