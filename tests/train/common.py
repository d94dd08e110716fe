"""What tests of scripts/train.py share."""

import csv
from pathlib import Path

import pytest
import torch

QUIETLY = pytest.mark.filterwarnings(
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
ROOT = Path(__file__).resolve().parents[2]
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
    "SINGD": "{lr: 0.01, structure: diagonal, kfac_approx: reduce}",
    "KFAC": "{lr: 0.02, T: 2, T_inverse: 4}",
}


def optimizer(name):
    """Arguments that choose an optimizer."""
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
    """The last checkpoint of a run."""
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def folder(root, *parts):
    """An ImageFolder with one image for each of the given paths."""
    from PIL import Image

    for part in parts:
        (root / part).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 36), "red").save(root / part)
    return ["--data=Folder", f"--data.root={root}", "--model.name=torchvision/resnet18"]


def interrupted(run, arguments, at, **options):
    """Fit into "part" until the `at`-th step begins, which fails; checkpoints every 3 steps."""
    from training.callbacks import Speed

    class Stop(Exception):
        pass

    def stop(self, trainer, *_):
        if trainer.global_step == at:
            raise Stop

    Speed.on_before_optimizer_step = stop
    try:
        run("fit", *arguments, "--checkpoint.every_n_steps=3", folder="part", **options)
    except Stop:
        return "interrupted"
    finally:
        del Speed.on_before_optimizer_step
