"""The ways in which users copy a model."""

import copy
import pickle
from collections.abc import Callable
from io import BytesIO

import torch
from torch import nn


def _saved_and_loaded(model: nn.Module) -> nn.Module:
    buffer = BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": _saved_and_loaded,
}
