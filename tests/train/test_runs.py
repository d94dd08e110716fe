"""scripts/train.py: whole runs, and configurations."""

import pytest
import torch
import yaml

from tests.train.common import (
    DIGITS,
    OPTIONS,
    QUIET,
    QUIETLY,
    folder,
    interrupted,
    last,
    logged,
    optimizer,
)

pytest.importorskip("lightning", reason="lightning is not installed")

from training.cli import main

pytestmark = QUIETLY


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
    assert ("curvature/A_condition_max" in values) == (name == "KFAC")
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
    code = interrupted(run, every, at=7)
    assert code == "interrupted" and last(saved)["global_step"] == 6
    assert run("fit", *every, "--ckpt_path=last", folder="part") == 0
    whole, resumed = last(tmp_path / "whole"), last(saved)
    assert whole["global_step"] == resumed["global_step"] == 2 * -(-21 // 2)
    for part in ("state_dict", "current_model_state"):
        for key, value in whole[part].items():
            assert torch.equal(value, resumed[part][key]), key
    assert run("validate", f"--ckpt_path={saved}/checkpoints/last.ckpt", folder="check") == 0


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


def test_image_folder(run, tmp_path):
    names = [f"{part}/{label}/{n}.png" for part in ("train", "val") for label in "ab" for n in "12"]
    data = folder(tmp_path / "images", *names)
    more = ["--data.size=32", "--data.resize=36", "--data.policy=trivialaugment"]
    more += ["--data.erasing=1", "--data.workers=0", "--data.batch_size=2", "--model.mixup=0.2"]
    assert run("fit", *more, data=data) == 0
    assert logged(tmp_path / "run")["val/top5"] == [1.0]
