"""Characters of the fonts that ship with matplotlib, distorted, on clutter: one hundred classes.

A picture is a character under a random affine map and a smooth random displacement, bright on dark
or the reverse, over fainter pieces of other characters. Characters that differ from another in
size or place alone (as c and C, о and O) are left out.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

CHARACTERS = (
    "0123456789ABDEFGHJKLMNQRTYabdefghijmnqrt"  # of EMNIST's classes, those of one shape each
    "ΓΔΘΛΞΠΣΦΨΩαβγδεζηθλμξπρσφψω"
    "БДЖЗИЛЦЧШЩЭЮЯбвджзийцчшщъыэюяђћљњє"
)
FONTS = ("DejaVuSans*.ttf", "DejaVuSerif*.ttf", "STIXGeneral*.ttf")
SIZE, DRAWN = 32, 48
"""Height and width of a picture, and of what it is sampled from."""


def pictures(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` pictures (count, 32, 32) as bytes, and the numbers of their characters."""
    generator = torch.Generator().manual_seed(seed)
    glyphs = render()
    parts = [_some(glyphs, n, generator) for n in _parts(count, 2048)]
    images, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return images.numpy(), labels.numpy()


def render() -> Tensor:
    """Every character in every font, (characters, fonts, 48, 48) in 0 … 1.

    Raises:
        OSError: If matplotlib's fonts are not where they should be.
    """
    import matplotlib
    from PIL import ImageFont

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    paths = sorted({path for name in FONTS for path in folder.glob(name)})
    paths = [path for path in paths if "Display" not in path.name]  # these have no letters
    if not paths:
        raise OSError(f"no font DejaVu*.ttf in {folder}: reinstall matplotlib")
    fonts = [ImageFont.truetype(str(path), round(0.7 * DRAWN)) for path in paths]
    drawn = np.stack([[_draw(letter, font) for font in fonts] for letter in CHARACTERS])
    return torch.from_numpy(drawn).float() / 255


def _draw(letter: str, font) -> np.ndarray:
    from PIL import Image, ImageDraw

    picture = Image.new("L", (DRAWN, DRAWN))
    middle = (DRAWN / 2, DRAWN / 2)
    ImageDraw.Draw(picture).text(middle, letter, 255, font, anchor="mm")
    return np.array(picture)


def _parts(count: int, size: int) -> list[int]:
    return [min(size, count - start) for start in range(0, count, size)]


def _some(glyphs: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    labels = torch.randint(len(glyphs), (n,), generator=generator)
    front = _bent(_chosen(glyphs, labels, generator), 0.15, uniform)
    others = torch.randint(len(glyphs), (n,), generator=generator)
    behind = _bent(_chosen(glyphs, others, generator), 0.9, uniform)
    contrast = uniform(0.5, 1.0, 1, 1)
    mixed = torch.maximum(contrast * front, uniform(0.1, 0.4, 1, 1) * contrast * behind)
    sign = uniform(-1.0, 1.0, 1, 1).sign()
    grey = 127.5 * (1 + sign * (2 * mixed - contrast))
    return grey.round().clamp(0, 255).to(torch.uint8), labels


def _chosen(glyphs: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    fonts = torch.randint(glyphs.shape[1], labels.shape, generator=generator)
    return glyphs[labels, fonts]


def _bent(images: Tensor, shift: float, uniform) -> Tensor:  # (n, 48, 48) -> (n, 32, 32)
    """Turned, sheared, scaled, moved by up to `shift` of the picture, and warped."""
    angle, shear = uniform(-0.45, 0.45), uniform(-0.3, 0.3)
    scale = uniform(0.75, 1.25)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rows = [
        torch.stack([cos, shear - sin, uniform(-shift, shift) * 1.5], 1),
        torch.stack([sin, cos, uniform(-shift, shift) * 1.5], 1),
    ]
    grid = nn.functional.affine_grid(
        torch.stack(rows, 1), [len(images), 1, SIZE, SIZE], align_corners=False
    )
    warp = nn.functional.interpolate(uniform(-0.16, 0.16, 2, 4, 4), SIZE, mode="bicubic")
    grid = grid + warp.permute(0, 2, 3, 1)
    return nn.functional.grid_sample(images[:, None], grid, align_corners=False)[:, 0]
