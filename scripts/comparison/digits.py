"""The task: scikit-learn's handwritten digits and a small network for them.

The 1797 real 8x8 images ship with scikit-learn, so nothing is downloaded.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from comparison.config import Data, Network


class Digits(NamedTuple):
    """Images (n, 1, 8, 8) scaled to [0, 1], and their digits (n,)."""

    train_images: Tensor
    train_labels: Tensor
    eval_images: Tensor
    eval_labels: Tensor


def load(config: Data) -> Digits:
    """Load the digits, split as `config` says.

    Raises:
        ValueError: if a fraction leaves a part without an image of every digit.
    """
    pixels, labels = load_digits(return_X_y=True)
    fractions = [("data.test_fraction", config.test_fraction)]
    if config.evaluate_on == "validation":
        fractions.append(("data.validation_fraction", config.validation_fraction))
    parts = [pixels, pixels, labels, labels]
    for key, fraction in fractions:
        pixels, labels = parts[0], parts[2]
        try:
            parts = train_test_split(
                pixels,
                labels,
                test_size=fraction,
                random_state=config.split_seed,
                stratify=labels,
            )
        except ValueError as error:
            raise ValueError(f"{key}: {fraction} cannot be used: {error}") from None
    train_pixels, eval_pixels, train_labels, eval_labels = parts
    return Digits(
        _images(train_pixels),
        torch.as_tensor(train_labels),
        _images(eval_pixels),
        torch.as_tensor(eval_labels),
    )


def _images(pixels) -> Tensor:  # (n, 64) in 0 … 16 -> (n, 1, 8, 8) in 0 … 1
    return torch.as_tensor(pixels, dtype=torch.float32).div(16).reshape(-1, 1, 8, 8)


def make_network(config: Network) -> nn.Sequential:
    """Build a BatchNorm CNN: a dense, a strided grouped and a dense 3x3 convolution."""
    width, groups = config.width, config.groups
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, groups=groups, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(inplace=True),
        nn.Conv2d(2 * width, 4 * width, 3, padding=1, bias=False),
        nn.BatchNorm2d(4 * width),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, 10),
    )
