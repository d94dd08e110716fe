"""Checkpoints that are whole or not there, and are checked before they are loaded."""

from __future__ import annotations

import os
import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

MARK = "tn_kfac"
UNREADABLE = (
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    KeyError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    zlib.error,
)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the file, to the disk, then puts it in place in one move.

    (Lightning's own writer goes by way of a temporary folder, whence a file may have to
    be copied: a killed process leaves half of it.)
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in path.parent.glob(f".{path.name}.*.part"):  # of a killed process
            stale.unlink(missing_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)

    def load_checkpoint(
        self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load a checkpoint that this script wrote.

        Raises:
            ValueError: If it is truncated, damaged, or not such a checkpoint.
        """
        advice = "give a .ckpt file that train.py wrote, or 'last'"
        if not Path(path).is_file():
            raise ValueError(f"ckpt_path: there is no file {str(path)!r}; {advice}")
        try:
            only = True if weights_only is None else weights_only
            _check_sums(path)
            checkpoint = torch.load(path, map_location=map_location, weights_only=only)
        except UNREADABLE:
            raise ValueError(
                f"ckpt_path: {str(path)!r} is truncated or damaged, or no checkpoint; {advice}"
            ) from None
        if not isinstance(checkpoint, dict) or MARK not in checkpoint:
            raise ValueError(f"ckpt_path: {str(path)!r} was not written by train.py; {advice}")
        return checkpoint


def _check_sums(path: Any) -> None:
    """Read all of it, for torch loads a file with a flipped bit."""
    with zipfile.ZipFile(path) as file:
        if (damaged := file.testzip()) is not None:
            raise OSError(f"{damaged} has another checksum")


def _sync_folder(folder: Path) -> None:
    """Have a rename outlive a power cut, where the system lets one."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class Last(ModelCheckpoint):
    """Keeps `last.ckpt`: written every n steps and at the end of every epoch.

    Args:
        folder: Where to; `checkpoints` in `trainer.default_root_dir` if None.
        every_n_steps: Steps between two checkpoints.
    """

    def __init__(self, folder: str | None = None, every_n_steps: int = 1000) -> None:
        if every_n_steps < 1:
            raise ValueError(f"checkpoint.every_n_steps: {every_n_steps} must be 1 or more")
        super().__init__(
            dirpath=folder, save_last=True, save_top_k=0, every_n_train_steps=every_n_steps
        )

    @property
    def state_key(self) -> str:
        """Without the interval, so that a run may go on with another."""
        return "Last"

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
