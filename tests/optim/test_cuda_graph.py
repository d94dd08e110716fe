"""On a GPU: a whole training step, captured in one CUDA graph, is the eager step.

Counters on the host do not advance in a replay, so all hyper-parameters are constant, and every
step takes the same branches.
"""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from tn_kfac import KFAC, SINGD

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

WARM, REPLAYS = 4, 5
DEVICE = "cuda"
# With half of each average new, Newton-Schulz starts anew in every step, warm or replayed.
NEWTON = {"inverse": "newton-schulz", "T_inverse": 1, "factor_decay": 0.5}
BUILDS = {
    "SINGD diagonal": partial(SINGD, structure="diagonal", T=1, lr_cov=0.1),
    "SINGD dense": partial(SINGD, structure="dense", T=1, lr_cov=0.1),
    "KFAC newton-schulz": partial(KFAC, T=1, **NEWTON),
}


def small(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10),
    ).to(DEVICE, dtype)  # fmt: skip


def batch(step: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 3, 12, 12, generator=generator, dtype=torch.float64)
    return x.to(DEVICE, dtype), torch.randint(0, 10, (16,), generator=generator).to(DEVICE)


def train_step(model, optimizer, x, y):
    optimizer.zero_grad(set_to_none=True)
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()


def captured(model, optimizer, x, y, warm):
    """The graph of a step on the static batch x, y, after warm-up steps on other batches."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for step in warm:
            train_step(model, optimizer, *batch(step))
    torch.cuda.current_stream().wait_stream(side)
    optimizer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        train_step(model, optimizer, x, y)
    return graph


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_replayed_steps_equal_eager_ones(build):
    model = small()
    twin = copy.deepcopy(model)
    optimizer, oracle = build(model), build(twin)
    x, y = batch(0)
    graph = captured(model, optimizer, x, y, range(WARM))
    for step in range(WARM, WARM + REPLAYS):
        for static, new in zip((x, y), batch(step), strict=True):
            static.copy_(new)
        graph.replay()
    for step in range(WARM + REPLAYS):
        train_step(twin, oracle, *batch(step))
    close = partial(torch.testing.assert_close, rtol=1e-8, atol=1e-10)
    for name, value in twin.state_dict().items():
        close(model.state_dict()[name], value)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        for key, value in oracle.state[q].items():
            if isinstance(value, torch.Tensor):
                close(optimizer.state[p][key], value)


def test_eager_steps_follow_on_a_captured_one_of_the_same_stream():
    """In float32 the whole step is fused, with tables in pinned memory."""
    model = small(torch.float32)
    twin = copy.deepcopy(model)
    optimizer, oracle = BUILDS["SINGD diagonal"](model), BUILDS["SINGD diagonal"](twin)
    static, stream = batch(WARM, torch.float32), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for step in range(WARM):
            train_step(model, optimizer, *batch(step, torch.float32))
        optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            train_step(model, optimizer, *static)
        graph.replay()
        for step in range(WARM + 1, WARM + 1 + REPLAYS):
            train_step(model, optimizer, *batch(step, torch.float32))
    torch.cuda.synchronize()
    for step in range(WARM + 1 + REPLAYS):
        train_step(twin, oracle, *batch(step, torch.float32))
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("structure", ["diagonal", "dense"])
def test_models_compiled_into_graphs_train_as_eager_ones(mode, structure):
    """A captured backward pass measures its own batch, and nothing overwrites what it found."""
    model = small(torch.float32)
    twin = copy.deepcopy(model)
    options = {"structure": structure, "T": 1, "lr_cov": 0.1}  # moves of 0.02
    optimizer, oracle = SINGD(model, **options), SINGD(twin, **options)
    compiled = torch.compile(model, mode=mode)
    for step in range(12):
        x, y = batch(step, torch.float32)
        train_step(compiled, optimizer, x, y)
        train_step(twin, oracle, x, y)
        _ = [torch.full((2**k,), torch.nan, device=DEVICE) for k in range(4, 20)]  # takes memory
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=2e-3, atol=1e-4)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        for key in ("K", "C"):
            if key in oracle.state[q]:
                found, expected = optimizer.state[p][key], oracle.state[q][key]
                torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-3)
