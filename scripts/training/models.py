"""Networks by name: of torchvision, of timm, or small ones of our own."""

from __future__ import annotations

import difflib
from typing import Any

import torchvision
from torch import nn


def build(name: str, num_classes: int, in_channels: int, options: dict[str, Any]) -> nn.Module:
    """Make a network with fresh weights.

    Args:
        name: "torchvision/resnet18", "timm/vit_small_patch16_224", "small/cnn", "small/mlp".
        num_classes: Its outputs.
        in_channels: Of its input.
        options: Further arguments of its constructor.

    Raises:
        ValueError: If there is no such network, or it cannot be made so.
    """
    library, _, model = name.partition("/")
    if library not in LIBRARIES:
        raise ValueError(
            f"model.name: {name!r} must be LIBRARY/NAME with a library of {', '.join(LIBRARIES)}"
        )
    try:
        return LIBRARIES[library](model, num_classes, in_channels, options)
    except TypeError as error:
        raise ValueError(f"model.options: {options!r} do not suit {name!r}: {error}") from None


def _torchvision(name: str, num_classes: int, in_channels: int, options: dict) -> nn.Module:
    known = torchvision.models.list_models(torchvision.models)
    _check("torchvision", name, known)
    model = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)
    return model if in_channels == 3 else _with_input(model, in_channels)


def _with_input(model: nn.Module, channels: int) -> nn.Module:
    """Replace the first convolution by one of other input channels; torchvision has no option."""
    path, first = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    new = nn.Conv2d(
        channels,
        first.out_channels,
        first.kernel_size,  # type: ignore[arg-type]
        first.stride,  # type: ignore[arg-type]
        first.padding,  # type: ignore[arg-type]
        first.dilation,  # type: ignore[arg-type]
        bias=first.bias is not None,
    )
    model.set_submodule(path, new)
    return model


def _timm(name: str, num_classes: int, in_channels: int, options: dict) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise ValueError(
            f"model.name: 'timm/{name}' needs timm, which is not installed; pip install timm"
        ) from None
    _check("timm", name, timm.list_models())
    return timm.create_model(name, num_classes=num_classes, in_chans=in_channels, **options)


def _check(library: str, name: str, known: list[str]) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, 3) or sorted(known)[:3]
        raise ValueError(
            f"model.name: {library} has no {name!r}; there are, for instance, {', '.join(near)}"
        )


def _small(name: str, num_classes: int, in_channels: int, options: dict) -> nn.Module:
    _check("small", name, list(SMALL))
    return SMALL[name](num_classes, in_channels, **options)


def cnn(num_classes: int, in_channels: int, width: int = 16, dropout: float = 0.0) -> nn.Module:
    """Three convolutions with batch norm, the second strided and grouped."""

    def block(*sizes: int, **options: int) -> list[nn.Module]:
        convolution = nn.Conv2d(*sizes, 3, padding=1, bias=False, **options)  # type: ignore[misc]
        return [convolution, nn.BatchNorm2d(sizes[1]), nn.ReLU(inplace=True)]

    return nn.Sequential(
        *block(in_channels, width),
        *block(width, 2 * width, stride=2, groups=4 if width % 4 == 0 else 1),
        *block(2 * width, 4 * width),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(16 * width, num_classes),
    )


def mlp(num_classes: int, in_channels: int, width: int = 64, dropout: float = 0.0) -> nn.Module:
    """Two hidden layers on the image pooled to 8x8."""
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(8),
        nn.Flatten(),
        nn.Linear(64 * in_channels, width),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, num_classes),
    )


SMALL = {"cnn": cnn, "mlp": mlp}
LIBRARIES = {"torchvision": _torchvision, "timm": _timm, "small": _small}
