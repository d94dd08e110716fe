"""A forward and backward pass of an example that leaves a model as it was."""

from __future__ import annotations

import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import Parameter
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from tn_kfac.layers import Layer

Example = Tensor | tuple[Any, ...] | dict[str, Any]
Calls = Counter[tuple[torch.Size, torch.Size]]
"""How often a layer was called with which shapes of input and output."""


class Trace(NamedTuple):
    """What the pass showed.

    calls: Of each layer that was called.
    used: The parameters that got a gradient.
    flops: Of both directions, as torch counts them.
    """

    calls: Mapping[nn.Module, Calls]
    used: frozenset[Parameter]
    flops: int


def trace(model: nn.Module, layers: Mapping[nn.Module, Layer], example: Example) -> Trace:
    """Run a model forward and backward, in its present mode and with copies of its buffers.

    Args:
        model: The model.
        layers: The modules whose calls are recorded.
        example: A tensor, a tuple of arguments or a dict of keyword arguments.

    Raises:
        TypeError: If the example is none of these.
    """
    args, kwargs = _arguments(example)
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients: Iterable[Tensor | None] = ()
    with _apart(model), FlopCounterMode(display=False) as counter:
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        with _recorded(layers) as calls:
            outputs = _tensors(functional_call(model, buffers, args, kwargs))
        outputs = [t for t in outputs if t.requires_grad]
        seeds = [torch.ones_like(t) for t in outputs]
        if outputs and trained:
            gradients = torch.autograd.grad(outputs, trained, seeds, allow_unused=True)
    used = (p for p, g in zip(trained, gradients, strict=False) if g is not None)
    return Trace(calls, frozenset(used), counter.get_total_flops())


def _arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the model, with copies of the example's tensors."""
    if not isinstance(example, Tensor | tuple | dict):
        raise TypeError(
            "example_input must be a tensor, a tuple of arguments or a dict of keyword arguments, "
            f"got {type(example).__name__}"
        )
    with torch.inference_mode(False):
        copied = tree_map_only(Tensor, _copied, example)
    if isinstance(copied, dict):
        return (), copied
    return copied if isinstance(copied, tuple) else (copied,), {}


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


@contextmanager
def _apart(model: nn.Module) -> Iterator[None]:
    """Gradients are on, compiled modules run eagerly; random states are restored."""
    devices = {t.device for t in (*model.parameters(), *model.buffers())}
    kind = next((d.type for d in devices if d.type not in ("cpu", "meta")), "cuda")
    indices = [device.index for device in devices if device.type == kind]
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Using `torch.compile")  # the counter has global hooks
        stack.enter_context(torch.random.fork_rng(indices, device_type=kind))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if "torch._dynamo" in sys.modules:  # else nothing is compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextmanager
def _recorded(layers: Mapping[nn.Module, Layer]) -> Iterator[dict[nn.Module, Calls]]:
    """Count the calls of all layers while the context lasts."""
    calls: dict[nn.Module, Calls] = defaultdict(Counter)

    def hook(layer: Layer) -> Callable[..., None]:
        def record(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            calls[module][layer.saved(module, args, kwargs)[0].shape, output.shape] += 1

        return record

    with ExitStack() as stack:
        for module, layer in layers.items():
            handle = module.register_forward_hook(hook(layer), with_kwargs=True)
            stack.callback(handle.remove)
        yield calls


def _tensors(output: Any) -> list[Tensor]:
    """All tensors in what a model returned."""
    plain = is_dataclass(output) and not isinstance(output, dict)
    leaves = tree_leaves(vars(output) if plain else output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
