"""The models, the modes in which they are trained, and one training step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.step.optimizers import Stepper


@dataclass(frozen=True)
class Network:
    """How to make a model, and the batch and image size at which it is trained."""

    make: Callable[[], nn.Module]
    batch: int = 128
    pixels: int = 256
    classes: int = 1000


def _torchvision(name: str) -> Callable[[], nn.Module]:
    """Made when called, so that the tiny model does without torchvision."""

    def make() -> nn.Module:
        import torchvision

        return torchvision.models.get_model(name)

    return make


def tiny() -> nn.Module:
    """Two convolutions, a norm and a linear layer, to see that all works."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 10),
    )  # fmt: skip


NETWORKS: Mapping[str, Network] = {
    "tiny": Network(tiny, 4, 12, 10),
    "resnet18": Network(_torchvision("resnet18")),
    "vgg19": Network(_torchvision("vgg19")),
    "convnext_base": Network(_torchvision("convnext_base"), 64),
    "resnet50": Network(_torchvision("resnet50")),
    "vit_b_16": Network(_torchvision("vit_b_16"), pixels=224),
}


COMPILED = {"compiled": "default", "reduce-overhead": "reduce-overhead"}
"""The mode of `torch.compile`, by ours."""
EAGER = 20
"""Steps before one is captured: kernels are chosen by then, and averages as new as they will be."""


class Training:
    """A model, its optimizer and one random batch; a call is one step."""

    def __init__(
        self, network: Network, mode: str, build: Callable[[nn.Module], Stepper], device: str
    ) -> None:
        torch.manual_seed(0)
        with torch.device(device):  # made there: initialisation on the host takes seconds
            model = network.make()
            images = torch.randn(network.batch, 3, network.pixels, network.pixels)
            self.labels = torch.randint(0, network.classes, (network.batch,))
        self.device, self.half = device, mode != "fp32"
        if self.half:
            images = images.contiguous(memory_format=torch.channels_last)
            model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.images = images
        self.optimizer = build(model)
        self.model: Any = model
        if mode in COMPILED:
            self.model = torch.compile(model, mode=COMPILED[mode])
        self.eager = EAGER if mode == "graph" else 0
        """Steps before one is captured, if that is the mode."""
        self.peak: int | None = None
        """Bytes that the captured step allocates, at most."""
        self._graph: torch.cuda.CUDAGraph | None = None
        self._steps = 0

    def __call__(self) -> None:
        """As a user's script has it, or a replay of that."""
        if self._graph is not None:
            self._graph.replay()
        elif self.eager and self._steps == self.eager:
            self._capture()
        else:
            self._step()
            self._steps += 1

    def _capture(self) -> None:
        self.optimizer.zero_grad()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        self.peak, self._graph = torch.cuda.max_memory_allocated(), graph

    def _step(self) -> None:
        self.optimizer.zero_grad()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.half):
            loss = nn.functional.cross_entropy(self.model(self.images), self.labels)
        loss.backward()
        self.optimizer.step()
