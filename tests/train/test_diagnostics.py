"""scripts/train.py: what is logged of factors."""

import pytest
import torch

pytest.importorskip("lightning", reason="lightning is not installed")

from training.callbacks import factor_values


def test_values_of_factors():
    first, second = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([first, second])
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    dense = turn @ torch.diag(torch.tensor([10.0, 0.1])) @ turn.T
    optimizer.state[first] = {"A": dense[None], "G": torch.tensor([[2.0, -4.0, 8.0]])}
    optimizer.state[second] = {"A": torch.eye(600)[None], "momentum_buffer": torch.zeros(2)}
    values = {name: value.item() for name, value in factor_values(optimizer).items()}
    assert values == pytest.approx(
        {
            "curvature/A_norm_max": 600**0.5,
            "curvature/A_norm_min": (100 + 0.01) ** 0.5,
            "curvature/A_ratio_max": 6.436 / 3.664,
            "curvature/A_condition_max": 100,
            "curvature/G_norm_max": 84**0.5,
            "curvature/G_norm_min": 84**0.5,
            "curvature/G_ratio_max": 4,
        },
        rel=1e-4,
    )
    assert not factor_values(torch.optim.SGD([first]))
