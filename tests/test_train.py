"""scripts/train.py: whole runs, and what is said of a wrong configuration."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("lightning", reason="lightning is not installed")

from training import models
from training.cli import main
from training.optimizers import OptimizerChoice, build

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*logging interval",
    "ignore:.*exists and is not empty",
    "ignore:.*LeafSpec.*:FutureWarning",
    "ignore:.*treespec.*:FutureWarning",
    "ignore::DeprecationWarning",  # of jsonargparse and Lightning among themselves
    "ignore:The dirpath has changed",
    "ignore:.*callbacks used to create the checkpoint",  # to validate, without them
    "ignore:.*estimated_stepping_batches.*",
)
ROOT = Path(__file__).resolve().parents[1]
QUIET = [
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.log_every_n_steps=4",
]
DIGITS = ["--data=Digits", "--model.name=small/cnn", "--model.options.width=8"]
OPTIONS = {
    "SGD": "{lr: 0.1, momentum: 0.9}",
    "AdamW": "{lr: 0.01}",
    "Muon": "{lr: 0.05, adamw_lr: 0.01}",
    "SINGD": "{lr: 0.05, structure: diagonal, kfac_approx: reduce, T: 1}",
    "KFAC": "{lr: 0.02, T: 2, T_inverse: 4}",
}


@pytest.fixture
def run(tmp_path):
    """Run train.py in this process, into a folder of `tmp_path`; return the exit code."""

    def run(command, *arguments, folder="run", data=DIGITS, print_only=False):
        root = [] if print_only else [f"--trainer.default_root_dir={tmp_path / folder}"]
        return main([command, *QUIET, *data, *root, *arguments])

    return run


def optimizer(name, **changes):
    return [f"--model.optimizer.name={name}", f"--model.optimizer.options={OPTIONS[name]}"]


def logged(folder):
    """Every value that was logged, by name."""
    values = {}
    for path in sorted((folder / "csv").glob("version_*/metrics.csv")):
        for row in csv.DictReader(path.read_text().splitlines()):
            for key, value in row.items():
                if value:
                    values.setdefault(key, []).append(float(value))
    return values


def last(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.mark.parametrize("name", OPTIONS)
def test_two_epochs_of_digits(name, run, tmp_path):
    data = [*DIGITS, "--model.name=small/mlp"] if name == "Muon" else DIGITS
    more = ["--trainer.max_epochs=2", "--diagnostics.every_n_steps=5"]
    assert run("fit", *optimizer(name), *more, data=data) == 0
    values = logged(tmp_path / "run")
    assert values["val/top1"][-1] > 0.6  # it learns: chance is 0.1
    assert values["val/top5"][-1] >= values["val/top1"][-1]
    assert values["train/loss"][-1] < values["train/loss"][0]
    assert min(values["train/images_per_second"]) > 0
    assert values["train/lr"][-1] < values["train/lr"][0]  # the cosine
    assert min(values["update/norm"]) > 0
    factors = {"SINGD": "KC", "KFAC": "AG"}.get(name, "")
    for factor in factors:
        assert min(values[f"curvature/{factor}_ratio_max"]) >= 1
    assert any(key.startswith("curvature/") for key in values) == bool(factors)
    assert last(tmp_path / "run")["global_step"] == 2 * (1347 // 64)
    assert (tmp_path / "run" / "checkpoints" / "best.ckpt").is_file()


def test_everything_at_once(run, tmp_path):
    """Resumed, with all that is random and all that has a state, the run is the whole one."""
    ema = "[{class_path: EMAWeightAveraging, init_args: {decay: 0.9}}]"
    options = "{lr: 0.05, fisher: mc, T: 1}"
    every = [
        "--model.optimizer.name=SINGD",
        f"--model.optimizer.options={options}",
        "--model.optimizer.decay_vectors=false",
        "--model.options.dropout=0.2",
        "--model.mixup=0.2",
        "--model.cutmix=1",
        "--model.label_smoothing=0.1",
        "--model.channels_last=true",
        "--model.schedule.warmup_steps=3",
        "--trainer.precision=bf16-mixed",
        "--trainer.accumulate_grad_batches=2",
        "--trainer.gradient_clip_val=1",
        "--trainer.max_epochs=2",
        f"--trainer.callbacks={ema}",
    ]
    assert run("fit", *every, folder="whole") == 0
    saved = tmp_path / "part"
    code = _interrupted(run, every, at=7)
    assert code == "interrupted" and last(saved)["global_step"] == 6
    assert run("fit", *every, "--ckpt_path=last", folder="part") == 0
    whole, resumed = last(tmp_path / "whole"), last(saved)
    assert whole["global_step"] == resumed["global_step"] == 2 * -(-21 // 2)
    for part in ("state_dict", "current_model_state"):
        for key, value in whole[part].items():
            assert torch.equal(value, resumed[part][key]), key
    assert run("validate", f"--ckpt_path={saved}/checkpoints/last.ckpt", folder="check") == 0


def _interrupted(run, arguments, at):
    """Fit until the `at`-th optimizer step begins, which fails; a checkpoint every 3 steps."""
    from training.callbacks import Speed

    class Stop(Exception):
        pass

    def stop(self, trainer, *_):
        if trainer.global_step == at:
            raise Stop

    Speed.on_before_optimizer_step = stop
    try:
        run("fit", *arguments, "--checkpoint.every_n_steps=3", folder="part")
    except Stop:
        return "interrupted"
    finally:
        del Speed.on_before_optimizer_step


GLYPHS = ["--data=Glyphs", "--data.train_images=256", "--data.validation_images=128"]
NOISE = ["--data=Synthetic", "--data.size=32", "--data.train_images=64"]
NOISE += ["--data.validation_images=8", "--data.classes=7", "--data.channels=4"]


@pytest.mark.parametrize("data", [GLYPHS, NOISE], ids=["glyphs", "synthetic"])
def test_other_data(data, run, tmp_path):
    model = ["--model.name=torchvision/resnet18", "--data.batch_size=32"]
    limits = ["--trainer.limit_train_batches=2", "--trainer.max_epochs=2"]
    assert run("fit", *limits, data=[*data, *model]) == 0
    state = last(tmp_path / "run")["state_dict"]
    channels, classes = (4, 7) if data is NOISE else (1, 62)
    assert state["network.conv1.weight"].shape[1] == channels
    assert len(state["network.fc.bias"]) == classes


def test_configuration_round_trip(run, tmp_path, capsys):
    printed = []
    for given in (optimizer("SINGD"), [f"--config={tmp_path / 'printed.yaml'}"]):
        with pytest.raises(SystemExit) as end:
            command = ["fit", *given] if printed else ["fit", *QUIET, *DIGITS, *given]
            main([*command, "--print_config"])
        assert end.value.code in (0, None)
        printed.append(yaml.safe_load(capsys.readouterr().out))
        (tmp_path / "printed.yaml").write_text(yaml.safe_dump(printed[-1]))
    assert printed[0] == printed[1]
    assert printed[0]["model"]["optimizer"]["options"]["structure"] == "diagonal"


def folder(root, *parts):
    """An ImageFolder with one image for each of the given paths."""
    from PIL import Image

    for part in parts:
        (root / part).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 36), "red").save(root / part)
    return ["--data=Folder", f"--data.root={root}", "--model.name=torchvision/resnet18"]


def test_image_folder(run, tmp_path):
    names = [f"{part}/{label}/{n}.png" for part in ("train", "val") for label in "ab" for n in "12"]
    data = folder(tmp_path / "images", *names)
    more = ["--data.size=32", "--data.resize=36", "--data.policy=trivialaugment"]
    more += ["--data.erasing=1", "--data.workers=0", "--data.batch_size=2", "--model.mixup=0.2"]
    assert run("fit", *more, data=data) == 0
    assert logged(tmp_path / "run")["val/top5"] == [1.0]


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
    assert "expected ROOT/train/CLASS/IMAGE.jpg" in one_line(capsys, named)


def test_class_without_images_is_one_line(run, tmp_path, capsys):
    data = folder(tmp_path / "images", "train/a/1.png", "val/a/1.png")
    (tmp_path / "images" / "train" / "a" / "1.png").rename(tmp_path / "images/train/a/1.txt")
    assert run("fit", "--data.batch_size=1", data=data) == 2
    one_line(capsys, "expected ROOT/train")


def one_line(capsys, named):
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("train.py: error: ")]
    assert len(lines) == 1 and named in lines[0], error
    return lines[0]


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
    for share in (0, 0.1, 0.5, 0.99):
        path.write_bytes(whole[: int(share * len(whole))])
        assert run("fit", f"--ckpt_path={path}", folder="new") == 2
        one_line(capsys, "is truncated, or no checkpoint")
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


def killed(tmp_path, kills, seed):
    """Kill a run so many times; whether its final weights are those of an uninterrupted one."""
    config = ROOT / "configs" / "train" / "digits_singd.yaml"
    arguments = ["fit", f"--config={config}", *QUIET, "--model.options={width: 8, dropout: 0.2}"]
    arguments += ["--trainer.max_epochs=2", "--checkpoint.every_n_steps=5", "--model.mixup=0.2"]
    arguments += ["--trainer.num_sanity_val_steps=0", "--trainer.logger=false"]
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "tests" / "killing.py",
            tmp_path,
            str(kills),
            str(seed),
            *arguments,
        ],
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT}:{ROOT / 'scripts'}:{os.getenv('PYTHONPATH', '')}",
        },
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    assert f"{kills} kills" in done.stdout and "within a checkpoint" in done.stdout
    whole, resumed = (last(tmp_path / name) for name in ("whole", "killed"))
    assert whole["global_step"] == resumed["global_step"] == 2 * (1347 // 64)
    return all(torch.equal(v, resumed["state_dict"][k]) for k, v in whole["state_dict"].items())


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.nightly)])
def test_killed_runs_end_with_the_same_weights(kills, tmp_path):
    assert killed(tmp_path, kills, seed=kills)
    assert not list((tmp_path / "killed" / "checkpoints").glob(".*.part"))


CONFIGS = sorted((ROOT / "configs").glob("*/*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configurations_parse(path, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["fit", f"--config={path}", "--print_config"])
    assert end.value.code in (0, None), capsys.readouterr().err
    chosen = OptimizerChoice(**yaml.safe_load(path.read_text())["model"]["optimizer"])
    build(chosen, models.build("small/cnn", 10, 1, {}))  # its options are right
