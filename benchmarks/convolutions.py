"""The convolutions that are measured: those of whole networks, and PEERS.md's named ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torchvision
from torch import nn

Ints = tuple[int, ...]


@dataclass(frozen=True)
class Layer:
    """A 2d convolution and the shape (n, c, h, w) of its input.

    `count` convolutions of the network share all of this; `name` is the first of them.
    """

    network: str
    name: str
    shape: Ints
    out_channels: int
    kernel_size: Ints
    stride: Ints
    padding: Ints
    dilation: Ints
    groups: int
    count: int = 1

    @property
    def window(self) -> dict[str, Ints]:
        """What `torch.nn.functional.unfold` takes."""
        return {"kernel_size": self.kernel_size, **self.steps}

    @property
    def steps(self) -> dict[str, Ints]:
        """The hyper-parameters besides the kernel's size and the groups."""
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}

    @property
    def output_size(self) -> Ints:
        """The spatial size of the output."""
        entries = (self.shape[2:], self.kernel_size, self.stride, self.padding, self.dilation)
        height, width = (
            (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, padding, dilation in zip(*entries, strict=True)
        )
        return height, width

    @property
    def columns(self) -> int:
        """How many entries the unfolded input has."""
        return math.prod((*self.shape[:2], *self.kernel_size, *self.output_size))

    def record(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return {**asdict(self), "output_size": self.output_size}


@dataclass(frozen=True)
class Network:
    """A torchvision model, the batch and image size at which a GPU meets it, and the least size."""

    make: Callable[[], nn.Module]
    batch: int = 128
    pixels: int = 256
    least_pixels: int = 32


NETWORKS: Mapping[str, Network] = {
    "resnet18": Network(torchvision.models.resnet18),
    "vgg19": Network(torchvision.models.vgg19),
    "convnext_base": Network(torchvision.models.convnext_base, batch=32),
    "mobilenet_v2": Network(torchvision.models.mobilenet_v2),
    "inception_v3": Network(
        lambda: torchvision.models.inception_v3(init_weights=False), 64, 299, least_pixels=75
    ),
    "resnext101": Network(torchvision.models.resnext101_32x8d, batch=32),
}

AUXILIARY_PIXELS = 299
"""InceptionV3's auxiliary classifier, run in training mode only, needs images so large."""


def of_network(name: str, batch: int | None = None, pixels: int | None = None) -> list[Layer]:
    """The distinct convolutions of a network, in the order in which it meets them.

    The forward pass runs on the meta device: shapes only, no memory.
    """
    network = NETWORKS[name]
    batch, pixels = batch or network.batch, max(pixels or network.pixels, network.least_pixels)
    layers: dict[Layer, int] = {}

    def note(module: nn.Conv2d, inputs: tuple[torch.Tensor]) -> None:
        layer = replace(_layer(name, module, inputs[0].shape), name="")
        first = names.setdefault(layer, paths[module])
        layers[replace(layer, name=first)] = layers.get(replace(layer, name=first), 0) + 1

    names: dict[Layer, str] = {}
    with torch.device("meta"):
        model = network.make().train(pixels >= AUXILIARY_PIXELS)
        paths = {module: path for path, module in model.named_modules()}
        for module in paths:
            if isinstance(module, nn.Conv2d):
                module.register_forward_pre_hook(note)
        with torch.no_grad():
            model(torch.empty(batch, 3, pixels, pixels))
    return [replace(layer, count=count) for layer, count in layers.items()]


def _layer(network: str, module: nn.Conv2d, shape: torch.Size) -> Layer:
    if isinstance(module.padding, str) or module.padding_mode != "zeros":
        raise ValueError(f"{network} has {module}: only explicit zero padding can be unfolded")
    return Layer(
        network, "", tuple(shape), module.out_channels, module.kernel_size, module.stride,
        module.padding, module.dilation, module.groups,
    )  # fmt: skip


def _named(
    name: str, shape: Ints, out: int, kernel: int, stride: int = 1,
    padding: int = 0, groups: int = 1,
) -> Layer:  # fmt: skip
    pairs = ((kernel, kernel), (stride, stride), (padding, padding), (1, 1))
    return Layer("peers", name, shape, out, *pairs, groups)


PEERS = (
    _named("ConvNeXt features.1.0.block.0, 7x7 depthwise", (32, 128, 64, 64), 128, 7, 1, 3, 128),
    _named("ResNet18 conv1, 7x7 stride 2", (128, 3, 256, 256), 64, 7, 2, 3),
    _named("ResNet18 layer1, 3x3", (128, 64, 64, 64), 64, 3, 1, 1),
    _named("VGG 3x3, 64 channels at 256²", (64, 64, 256, 256), 64, 3, 1, 1),
    _named("ResNet18 layer2.0.downsample.0, 1x1 stride 2", (128, 64, 64, 64), 128, 1, 2),
    _named("ConvNeXt features.0.0, patchify 4x4 stride 4", (64, 3, 256, 256), 128, 4, 4),
    _named("ResNet18 layer4, 3x3", (128, 512, 8, 8), 512, 3, 1, 1),
)
"""The layers that PEERS.md names: six of its table of KFAC-reduce, the last of KFAC-expand's."""


def peers(batch: int | None = None, pixels: int | None = None) -> list[Layer]:
    """The named layers; with `pixels`, as if their networks' images had so many, not 256."""
    scaled = []
    for layer in PEERS:
        n, c, *sizes = layer.shape
        height, width = (max(size * (pixels or 256) // 256, *layer.kernel_size) for size in sizes)
        scaled.append(replace(layer, shape=(batch or n, c, height, width)))
    return scaled


def convolutions(source: str, batch: int | None = None, pixels: int | None = None) -> list[Layer]:
    """The layers of a network, or of PEERS.md for the source "peers"."""
    return peers(batch, pixels) if source == "peers" else of_network(source, batch, pixels)
