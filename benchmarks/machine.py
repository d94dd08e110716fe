"""What a result depends on besides the code: machine, versions, precision."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("tn_kfac", "torch", "torchvision", "opt_einsum", "einconv")


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str | None]:
    """Of Python, the packages (None: absent), CUDA, cuDNN and this repository."""
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
        "cuda": torch.version.cuda,
        "cudnn": str(torch.backends.cudnn.version()) if torch.cuda.is_available() else None,
        "commit": _commit(),
    }


def machine(device: str) -> dict[str, Any]:
    """The processor, and the GPU if that is what is measured."""
    facts: dict[str, Any] = {
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
    }
    if device == "cuda":
        gpu = torch.cuda.get_device_properties()
        facts |= {"gpu": gpu.name, "gpu_bytes": gpu.total_memory, "l2_bytes": gpu.L2_cache_size}
    return facts


def set_precision(device: str, tf32: bool) -> None:
    """Let matrix products and cuDNN alike use TF32, or neither; and let cuDNN try algorithms."""
    if device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.backends.cudnn.allow_tf32 = tf32
        torch.backends.cudnn.benchmark = True


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit, marked if files differ from it; None outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
