"""Images of random curves, as in Hinton and Salakhutdinov (Science 313, 2006).

Each image of 28x28 pixels shows one curve, given by three random points in the plane: six numbers,
as many as the autoencoder's code has. The curve is the quadratic Bézier curve with these control
points, drawn with a Gaussian pen: the intensity of a pixel is the integral of the pen along the
curve, clipped to [0, 1].
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

PIXELS = 28
MARGIN = 3.0
"""Points keep this distance, in pixels, from the outermost pixels' centres."""
PEN, INK = 0.8, 2.0
"""Width of the pen (standard deviation in pixels); intensity of a straight line's centre, unclipped
at INK / √(2π) / PEN."""
SAMPLES = 64
"""Of each curve. The longest is 60 pixels, so samples are closer than the pen is wide."""


def curves(count: int, seed: int) -> Tensor:
    """`count` images (count, 784) in [0, 1]; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    points = MARGIN + (PIXELS - 1 - 2 * MARGIN) * torch.rand(count, 3, 2, generator=generator)
    return torch.cat([draw(part) for part in points.split(2000)])


def draw(points: Tensor) -> Tensor:
    """Images (n, 784) of the curves with control points (n, 3, 2), given as (x, y) in pixels."""
    t = ((torch.arange(SAMPLES) + 0.5) / SAMPLES)[:, None]
    first, middle, last = points.unsqueeze(2).unbind(1)
    place = (1 - t) ** 2 * first + 2 * t * (1 - t) * middle + t**2 * last
    length = (2 * (1 - t) * (middle - first) + 2 * t * (last - middle)).norm(dim=2) / SAMPLES
    pen = (-((torch.arange(PIXELS) - place[..., None]) ** 2) / (2 * PEN**2)).exp()
    columns, rows = pen.unbind(2)
    norm = INK / (2 * torch.pi * PEN**2)
    images = torch.einsum("ns,nsy,nsx->nyx", norm * length, rows, columns)
    return images.clamp_(0.0, 1.0).flatten(1)


@lru_cache(maxsize=2)
def data(train: int, test: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Training and test images, kept in memory."""
    images = curves(train + test, seed)
    return images[:train], images[train:]
