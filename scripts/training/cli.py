"""The command line: Lightning's, with this package's classes and defaults."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError
from lightning import Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

# Imported so that `--data=Glyphs` finds them by name.
from training import digits, folder, glyphs, shards, synthetic  # noqa: F401
from training.callbacks import Curvature, Speed
from training.checkpoints import AtomicCheckpointIO, Last
from training.data import Images
from training.module import Classifier

DEFAULTS = {"default_root_dir": "runs/train", "use_distributed_sampler": False, "max_epochs": 1}


class Cli(LightningCLI):
    """`fit`, `validate` and `test`, of a `Classifier` on `Images`."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        every = LightningCLI.subcommands()
        return {name: every[name] for name in ("fit", "validate", "test")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(Last, "checkpoint")
        parser.add_lightning_class_args(Curvature, "diagnostics")
        parser.link_arguments("seed_everything", "model.seed")
        parser.link_arguments("seed_everything", "data.init_args.seed")
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")
        parser.link_arguments("data.in_channels", "model.in_channels", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse `args` without Lightning's warning that there is a command line too."""
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Not as Lightning: our checkpoints hold no arguments, and are checked when loaded."""

    def before_instantiate_classes(self) -> None:
        config = self.config[self.config.subcommand]
        if config.checkpoint.folder is None:
            config.checkpoint.folder = str(Path(config.trainer.default_root_dir) / "checkpoints")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self._get(self.config_init, "trainer")
        root = config["default_root_dir"]
        if config["logger"] in (None, True):
            boards = [TensorBoardLogger(root, "tensorboard")] if find_spec("tensorboard") else []
            kwargs["logger"] = [CSVLogger(root, "csv"), *boards]
        if "fsdp" not in str(config["strategy"]).lower():  # which writes checkpoints in its own way
            kwargs["plugins"] = [*_as_list(config["plugins"]), AtomicCheckpointIO()]
        best = ModelCheckpoint(
            Path(root) / "checkpoints",
            filename="best",
            monitor="val/top1",
            mode="max",
            save_weights_only=True,
            enable_version_counter=False,
        )
        config["callbacks"] = [*_as_list(config["callbacks"]), Speed(), best]
        return super().instantiate_trainer(**kwargs)


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; return the exit code.

    An error in what the user gave (a ValueError) is said in one line, unless
    TN_KFAC_TRACEBACK is set in the environment.
    """
    torch.set_float32_matmul_precision("high")
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        Cli(
            Classifier,
            Images,
            subclass_mode_data=True,
            args=given,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            trainer_defaults=DEFAULTS,
            parser_kwargs={"exit_on_error": False},
            save_config_kwargs={"overwrite": True},
        )
    except (ValueError, OSError, ArgumentError, MisconfigurationException) as error:
        if os.environ.get("TN_KFAC_TRACEBACK"):
            raise
        print("train.py: error:", *str(_reason(error)).split(), file=sys.stderr)
        return 2
    return 0


def _reason(error: Exception) -> Exception:
    """What a data set said, without the list of types that jsonargparse wraps it in."""
    while type(error) is ValueError and isinstance(error.__cause__, ValueError):
        error = error.__cause__
    return error
