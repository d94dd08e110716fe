"""On a GPU: the side stream gives the same bits as none, while memory is scarce and reused."""

import pytest
import torch
from test_kfac_lag import build, each_variant
from torch import nn

from tn_kfac.optim import pending
from tn_kfac.optim.refresh import decompose

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def run_on_gpu(digits, **options) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 512), nn.Tanh(), nn.Linear(512, 10))
    model = model.cuda()
    optimizer = build(model, **options)
    for step in range(40):
        batch = slice(8 * (step % 8), 8 * (step % 8) + 8)
        x, y = digits[0][batch].float().cuda(), digits[1][batch].cuda()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        for _ in range(8):  # what was freed too early is written to here
            torch.full((512, 512), float("nan"), device="cuda")
    return model


@each_variant
def test_streams_do_not_matter(digits, options, monkeypatch):
    ours = run_on_gpu(digits, **options)

    def alone(*arguments):
        torch.cuda.synchronize()
        found = decompose(*arguments)
        torch.cuda.synchronize()
        return found

    monkeypatch.setattr(pending, "decompose", alone)
    start = pending.Beside.start

    def at_once(self, work, inputs):
        torch.cuda.synchronize()
        job = start(self, work, inputs)
        job._future.exception()
        return job

    monkeypatch.setattr(pending.Beside, "start", at_once)
    theirs = run_on_gpu(digits, **options)
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))


def test_graphs_of_a_step_are_refused():
    model = nn.Linear(4, 4).cuda()
    optimizer = build(model, T_inverse=lambda step: 1, inverse="newton-schulz")
    x = torch.randn(8, 4, device="cuda")

    def step():
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    optimizer.state_dict()  # the thread is idle then
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="lag=0"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        step()
