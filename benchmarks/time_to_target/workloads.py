"""What is trained: data, network, loss, and how long; a new workload is one entry of `WORKLOADS`.

Each has three sizes. "small" takes seconds on a CPU, to see that all works and for studies; "full"
is meant for one H200, minutes a run; "short" is the full network with fewer steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.curves.network import LOSS as CURVES_LOSS
from benchmarks.curves.network import autoencoder
from benchmarks.time_to_target import networks
from benchmarks.time_to_target.data import FILE, epochs, load, windows
from benchmarks.time_to_target.glyphs import CHARACTERS

Batch = tuple[Tensor, Tensor]
Metric = Literal["error rate", "loss", "squared error"]
SIZES = ("small", "short", "full")
GLYPHS: dict[str, Any] = {"classes": len(CHARACTERS)}


@dataclass(frozen=True)
class Size:
    """Steps at most, examples in a batch, examples held out, and the network's options."""

    steps: int
    batch: int
    held_out: int
    network: dict[str, Any] = field(default_factory=dict)
    noise: float = 0.0
    """Standard deviation of what is added to training images, anew in each batch."""
    evaluations: int = 40


@dataclass(frozen=True)
class Workload:
    """A task, apart from how long it is trained."""

    data: str
    network: Callable[..., nn.Module]
    metric: Metric
    sizes: Mapping[str, Size]
    loss: nn.Module = field(default_factory=nn.CrossEntropyLoss)
    loss_average: str = "batch"


def _curves() -> nn.Module:
    return autoencoder(torch.initial_seed())


def _sizes(small: Size, full: Size, short: int) -> dict[str, Size]:
    shorter = Size(short, full.batch, full.held_out, full.network, full.noise)
    return {"small": small, "short": shorter, "full": full}


WORKLOADS: dict[str, Workload] = {
    "curves": Workload(
        "curves", _curves, "squared error",
        _sizes(Size(200, 250, 500, evaluations=20), Size(4000, 1000, 5000), 1000), CURVES_LOSS,
    ),
    "digits": Workload(
        "digits", networks.digits_cnn, "loss",
        _sizes(
            Size(200, 64, 450, {"width": 8}, 0.3, 20), Size(2000, 64, 450, {"width": 32}, 0.3), 800
        ),
    ),
    "resnet": Workload(
        "glyphs", networks.resnet, "error rate",
        _sizes(
            Size(400, 32, 500, {"width": 8, "blocks": 1, "pool": 2, "classes": 10}, 0.0, 20),
            Size(5000, 256, 5000, {"width": 64, "blocks": 2} | GLYPHS, 0.3), 1250,
        ),
    ),
    "vit": Workload(
        "glyphs", networks.ViT, "error rate",
        _sizes(
            Size(400, 32, 500, {"dim": 64, "depth": 2, "pool": 2, "classes": 10}, 0.0, 20),
            Size(5000, 256, 5000, {"dim": 384, "depth": 12} | GLYPHS, 0.3), 1250,
        ),
    ),
    "convnext": Workload(
        "glyphs", networks.convnext, "error rate",
        _sizes(
            Size(400, 32, 500, {"width": 16, "blocks": (1, 1), "pool": 2, "classes": 10}, 0.0, 20),
            Size(5000, 256, 5000, {"width": 64, "blocks": (2, 2, 4)} | GLYPHS, 0.3), 1250,
        ),
    ),
    "gpt": Workload(
        "text", networks.GPT, "loss",
        _sizes(
            Size(500, 16, 64, {"dim": 64, "depth": 2, "context": 32}, evaluations=20),
            Size(4000, 64, 512, {"dim": 384, "depth": 6, "context": 256}), 1000,
        ),
        loss_average="batch+sequence",
    ),
}  # fmt: skip


class Task:
    """A workload of one size with its data on a device."""

    def __init__(self, name: str, size: str, device: str, mode: str, file: Path = FILE) -> None:
        self.workload, self.device, self.half = WORKLOADS[name], device, mode == "amp"
        self.size = self.workload.sizes[size]
        split, self.digest = load(self.workload.data, file)
        self.train = self._taken(split.train)
        self.held_out = self._held_out(self._taken(split.held_out))
        self.loss = self.workload.loss.to(device)

    def _taken(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """On the device; only examples of the network's classes."""
        if "classes" in self.size.network:
            x, labels = tensors
            wanted = labels < self.size.network["classes"]
            tensors = x[wanted], labels[wanted]
        return tuple(tensor.to(self.device) for tensor in tensors)

    @property
    def reads(self) -> bool:
        """Whether the data is one text."""
        return len(self.train) == 1

    def model(self, seed: int) -> nn.Module:
        """Fresh weights, the same for the same seed whatever the device."""
        torch.manual_seed(seed)
        return self.workload.network(**self.size.network).to(self.device)

    def batches(self, seed: int) -> Iterator[Batch]:
        """Without end; the same for the same seed."""
        noise = torch.Generator(self.device).manual_seed(seed)
        if self.reads:
            (text,) = self.train
            for index in windows(len(text), self.size.batch, self._context, seed):
                yield _shifted(text[index.to(self.device)])
        for index in epochs(len(self.train[0]), self.size.batch, seed):
            index = index.to(self.device, non_blocking=True)
            x, y = (tensor[index] for tensor in self.train)
            if self.size.noise:
                spread = torch.randn(x.shape, generator=noise, device=self.device)
                x = x + self.size.noise * spread
            yield x, y

    @property
    def _context(self) -> int:
        return self.size.network["context"]

    def _held_out(self, tensors: tuple[Tensor, ...]) -> list[Batch]:
        count = self.size.held_out
        if not self.reads:
            x, y = (tensor[:count] for tensor in tensors)
            return list(zip(x.split(500), y.split(500), strict=True))
        index = next(windows(len(tensors[0]), count, self._context, seed=0)).to(self.device)
        return [_shifted(part) for part in tensors[0][index].split(64)]

    def outputs(self, model: nn.Module, x: Tensor) -> Tensor:
        """Under autocast if that is asked for."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.half):
            return model(x)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> tuple[float, float]:
        """Loss and metric on the data held out, in evaluation mode."""
        model.eval()
        sums = torch.zeros(2, device=self.device)
        count = sum(len(y) for _, y in self.held_out)
        for x, y in self.held_out:
            outputs = self.outputs(model, x).float()
            loss = self.loss(outputs, y)
            sums += len(y) * torch.stack([loss, self._metric(outputs, y, loss)])
        model.train()
        loss, metric = (sums / count).tolist()
        return loss, metric

    def _metric(self, outputs: Tensor, y: Tensor, loss: Tensor) -> Tensor:
        match self.workload.metric:
            case "error rate":
                return (outputs.argmax(1) != y).float().mean()
            case "squared error":
                return (outputs.sigmoid() - y).square().sum() / len(y)
            case "loss":
                return loss


def _shifted(pieces: Tensor) -> Batch:
    """Bytes, and those that follow them, flat."""
    pieces = pieces.long()
    return pieces[:, :-1], pieces[:, 1:].flatten()
