"""The networks, small enough to be read: of convolutions, of attention, or of both kinds of groups.

What each stands for: "He et al. 2016" (CIFAR's ResNets, https://arxiv.org/abs/1512.03385), ViT
(https://arxiv.org/abs/2010.11929) with mean pooling, GPT-2, ConvNeXt
(https://arxiv.org/abs/2201.03545) with grouped down-sampling.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def digits_cnn(width: int, classes: int = 10) -> nn.Module:
    """Two convolutions and two linear layers, no norm, on 8x8 pixels."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.ReLU(inplace=True),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.ReLU(inplace=True),
        nn.Flatten(), nn.Linear(32 * width, 4 * width), nn.ReLU(inplace=True),
        nn.Linear(4 * width, classes),
    )  # fmt: skip


class Residual(nn.Module):
    """x + body(x), or shortcut(x) + body(x)."""

    def __init__(self, body: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.body, self.shortcut = body, shortcut or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.body(x)


def _normed(inputs: int, outputs: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return [convolution, nn.BatchNorm2d(outputs)]


def resnet(width: int, blocks: int, classes: int, pool: int = 1) -> nn.Module:
    """Three stages of basic blocks with batch norm."""
    layers: list[nn.Module] = [nn.AvgPool2d(pool), *_normed(1, width, 3), nn.ReLU(inplace=True)]
    inputs = width
    for stage in range(3):
        outputs = width * 2**stage
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            body = nn.Sequential(
                *_normed(inputs, outputs, 3, stride), nn.ReLU(inplace=True),
                *_normed(outputs, outputs, 3),
            )  # fmt: skip
            plain = stride == 1 and inputs == outputs
            shortcut = None if plain else nn.Sequential(*_normed(inputs, outputs, 1, stride))
            layers += [Residual(body, shortcut), nn.ReLU(inplace=True)]
            inputs = outputs
    pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)]
    return nn.Sequential(*layers, *pooled)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of images."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


def convnext(width: int, blocks: tuple[int, ...], classes: int, pool: int = 1) -> nn.Module:
    """Depthwise 7x7 and pointwise convolutions; down-sampling in four groups."""
    layers: list[nn.Module] = [
        nn.AvgPool2d(pool), nn.Conv2d(1, width, 2, stride=2), ChannelNorm(width),
    ]  # fmt: skip
    dim = width
    for stage, count in enumerate(blocks):
        dim = width * 2**stage
        if stage:
            down = nn.Conv2d(dim // 2, dim, 2, stride=2, groups=4)
            layers += [ChannelNorm(dim // 2), down]
        for _ in range(count):
            body = nn.Sequential(
                nn.Conv2d(dim, dim, 7, padding=3, groups=dim), ChannelNorm(dim),
                nn.Conv2d(dim, 4 * dim, 1), nn.GELU(), nn.Conv2d(4 * dim, dim, 1),
            )  # fmt: skip
            layers.append(Residual(body))
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(dim), nn.Linear(dim, classes)]
    return nn.Sequential(*layers, *head)


class Attention(nn.Module):
    """Multi-head self-attention of linear layers, so that each is seen by its hooks."""

    def __init__(self, dim: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:  # (n, tokens, dim)
        n, tokens, dim = x.shape
        q, k, v = self.qkv(x).view(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).reshape(n, tokens, dim))


def _transformer(dim: int, depth: int, causal: bool) -> nn.Sequential:
    """Pre-norm blocks with heads of 64 (or a quarter of a narrow network), and a last norm."""
    heads = max(4, dim // 64) if dim < 256 else dim // 64
    layers: list[nn.Module] = []
    for _ in range(depth):
        attention = nn.Sequential(nn.LayerNorm(dim), Attention(dim, heads, causal))
        mlp = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)
        )
        layers += [Residual(attention), Residual(mlp)]
    return nn.Sequential(*layers, nn.LayerNorm(dim))


def _start(model: nn.Module, depth: int) -> None:
    """GPT-2's: normal weights of deviation 0.02, less where a branch ends; no biases."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            ends = name.endswith(("out", "body.3"))
            nn.init.normal_(module.weight, std=0.02 / (2 * depth) ** 0.5 if ends else 0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


class ViT(nn.Module):
    """Patches of 4x4, learned positions, mean over tokens."""

    def __init__(self, dim: int, depth: int, classes: int, pool: int = 1) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(pool)
        self.patches = nn.Conv2d(1, dim, 4, stride=4)
        self.places = nn.Parameter(0.02 * torch.randn((8 // pool) ** 2, dim))
        self.blocks = _transformer(dim, depth, causal=False)
        self.head = nn.Linear(dim, classes)
        _start(self, depth)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(self.pool(x)).flatten(2).transpose(1, 2)
        return self.head(self.blocks(tokens + self.places).mean(1))


class GPT(nn.Module):
    """Logits of the next byte, (n · tokens, 256)."""

    def __init__(self, dim: int, depth: int, context: int) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, dim), nn.Embedding(context, dim)
        self.blocks = _transformer(dim, depth, causal=True)
        self.head = nn.Linear(dim, 256, bias=False)
        _start(self, depth)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        return self.head(self.blocks(self.bytes(x) + self.places(places))).flatten(0, 1)
