"""torch.compile: of the model, before or after the optimizer is built, with no graph break."""

import copy
import itertools

import pytest
import torch
from functorch.compile import make_boxed_func
from optimizers import Mixed, each_optimizer, factors_of, is_fresh, loss_of, train
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch import config as functorch_config

from tn_kfac import SINGD


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model, backend="aot_eager"):
    return torch.compile(model, fullgraph=True, backend=backend)


def assert_equal_steps(model, optimizer, twin, oracle, digits, steps=3, **close):
    """The compiled model trains as the eager one, factors included, which have moved."""
    train(model, optimizer, digits, range(steps))
    train(twin, oracle, digits, range(steps))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, **close)
        for key, value in oracle.state[q].items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(optimizer.state[p][key], value, **close)
        if oracle.state[q].get("updates"):
            assert not any(map(is_fresh, factors_of(optimizer.state[p])))


@each_optimizer
@pytest.mark.parametrize("first", ["model", "optimizer"])
def test_equals_eager(digits, build, first):
    """Compiled before or after the optimizer is built: the same trace, bit for bit."""
    model = Mixed()
    twin = copy.deepcopy(model)
    if first == "model":
        wrapped = compiled(model)
        optimizer = build(wrapped)
    else:
        optimizer = build(model)
        wrapped = compiled(model)
    assert_equal_steps(wrapped, optimizer, twin, build(twin), digits, rtol=1e-5, atol=1e-6)


@each_optimizer
def test_run_before_the_optimizer_is_built(digits, build):
    """A graph without taps is not used once there are taps; nor those of a twin without."""
    model = Mixed()
    wrapped, teacher = compiled(model), compiled(copy.deepcopy(model).requires_grad_(True))
    loss_of(wrapped, digits, 7).backward()
    twin = copy.deepcopy(model)
    optimizer = build(wrapped)
    loss_of(teacher, digits, 7).backward()
    assert_equal_steps(wrapped, optimizer, twin, build(twin), digits, rtol=1e-5, atol=1e-6)


@each_optimizer
def test_intervals_need_two_graphs(digits, build):
    """One with and one without taps; later steps compile nothing."""
    model = Mixed()
    twin = copy.deepcopy(model)
    optimizer, oracle = build(model, T=3), build(twin, T=3)
    wrapped = compiled(model)
    train(wrapped, optimizer, digits, range(4))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    train(wrapped, optimizer, digits, range(4, 10))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    train(twin, oracle, digits, range(10))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("structure", ["diagonal", "dense", "block5diagonal", "triltoeplitz"])
def test_inductor(digits, structure):
    """The default backend, whose code relies on strides: of blocks that do not fit, too."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.GELU(), nn.Linear(16, 10)).double()
    twin = copy.deepcopy(model)
    options = {"T": 1, "lr": 0.05, "lr_cov": 0.1, "structure": structure}
    optimizer, oracle = SINGD(model, **options), SINGD(twin, **options)
    wrapped = compiled(model, "inductor")
    assert_equal_steps(wrapped, optimizer, twin, oracle, digits, 2, rtol=1e-9, atol=1e-10)


@each_optimizer
def test_statistics_are_one_operator_a_layer(digits, build):
    """They are part of the backward graph."""
    model = Mixed()
    optimizer = build(model)
    seen = []

    def spy(graph, inputs):
        seen.append([str(node.target) for node in graph.graph.nodes])
        return make_boxed_func(graph)

    backend = aot_autograd(fw_compiler=spy, bw_compiler=spy)
    loss_of(torch.compile(model, fullgraph=True, backend=backend), digits, 0).backward()
    counts = [sum("tn_kfac.statistics" in name for name in names) for names in seen]
    assert counts == [0, 3]  # forward and backward
    assert optimizer._bindings[0].tap.factors() is not None


class Twice(nn.Module):
    """A layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, x):
        x = torch.tanh(self.layer(x.flatten(1)))
        return self.head(torch.tanh(self.layer(x)))


@each_optimizer
def test_layer_called_twice(digits, build):
    """Its samples are counted once, in the compiled graph too."""
    model = Twice().double()
    twin = copy.deepcopy(model)
    optimizer, oracle = build(model), build(twin)
    assert_equal_steps(compiled(model), optimizer, twin, oracle, digits, rtol=1e-9, atol=1e-10)


@each_optimizer
def test_autocast_micro_batches_and_discarded_gradients(digits, build):
    """bfloat16 autocast, two backward passes a step, and one whose gradients are dropped."""
    model = Twice()
    twin = copy.deepcopy(model)
    pairs = [(compiled(model), build(model, gentle=True)), (twin, build(twin, gentle=True))]
    for (net, optimizer), step in itertools.product(pairs, range(3)):
        optimizer.zero_grad()
        for part in (3 * step, 3 * step + 1, 3 * step + 2):
            if part % 3 == 1:
                net.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(net, digits, part)
            loss.backward()
        optimizer.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


def test_closed_optimizer_leaves_a_model_that_compiles(digits):
    model = Mixed()
    with SINGD(model, T=1) as optimizer:
        train(compiled(model), optimizer, digits, range(1))
    del optimizer
    loss_of(compiled(model), digits, 1).backward()
    assert model.head.weight.grad is not None


@pytest.mark.parametrize("fisher", ["mc", "type-2", "forward-only"])
@functorch_config.patch(donated_buffer=False)
def test_other_fishers(digits, fisher):
    """Curvature that is measured by backward passes of its own, through the compiled graph."""
    model = Twice().double()
    twin = copy.deepcopy(model)
    pairs = [
        (compiled(model), SINGD(model, T=1, lr=0.05, fisher=fisher)),
        (twin, SINGD(twin, T=1, lr=0.05, fisher=fisher)),
    ]
    for net, optimizer in pairs:
        for step in range(2):
            rows = slice(8 * step, 8 * step + 8)
            optimizer.zero_grad()
            outputs, targets = net(digits[0][rows]), digits[1][rows]
            generator = torch.Generator().manual_seed(step)
            optimizer.curvature(outputs, "cross_entropy", targets, generator=generator)
            nn.functional.cross_entropy(outputs, targets).backward()
            optimizer.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)


@pytest.mark.filterwarnings("ignore:Profiler record function")
@each_optimizer
def test_compiled_step(digits, build):
    """torch.compile of the step: the same parameters, few graphs, no break."""
    model = Twice().double()
    twin = copy.deepcopy(model)
    optimizer, oracle = build(model), build(twin)
    torch._dynamo.utils.counters.clear()
    step = torch.compile(optimizer.step, backend="aot_eager")
    for at in range(8):
        for net, owner, take in ((model, optimizer, step), (twin, oracle, oracle.step)):
            owner.zero_grad()
            loss_of(net, digits, at).backward()
            take()
    assert not torch._dynamo.utils.counters["graph_break"]
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 5
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
