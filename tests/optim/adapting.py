"""A small regression for the adaptive hyper-parameters of KFAC."""

import torch
from torch import Tensor, nn

from tn_kfac import KFAC

LOSS = nn.MSELoss()


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def batch(step: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(20, 5, generator=generator, dtype=torch.float64)
    return x, torch.stack([x[:, 0] * x[:, 1], x.sum(1), x[:, 2] ** 2], 1)


def flat(tensors) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def step(model, optimizer, data) -> float:
    optimizer.zero_grad()
    outputs = model(data[0])
    optimizer.curvature(outputs, LOSS, data[1])
    loss = LOSS(outputs, data[1])
    loss.backward()
    optimizer.step()
    return loss.item()


def make(model, **options) -> KFAC:
    return KFAC(model, **({"fisher": "type-2", "T_inverse": 1, "damping": 0.1} | options))
