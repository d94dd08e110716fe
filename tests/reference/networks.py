"""Small networks that tests train on 8x8 digits."""

import torch
from torch import Tensor, nn


class DigitNet(nn.Module):
    """Strided and padded convolutions, a Linear over tokens and one over samples."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, stride=2, padding=1, bias=bias)
        self.conv = nn.Conv2d(4, 3, (2, 3), padding=(0, 1), dilation=(2, 1), bias=bias)
        self.tokens = nn.Linear(3, 5, bias=bias)
        self.head = nn.Linear(5, 10, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.tanh(self.conv(x))
        x = torch.tanh(self.tokens(x.flatten(2).mT))
        return self.head(x.mean(1))
