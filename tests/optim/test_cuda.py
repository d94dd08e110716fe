"""On a GPU: steps that never wait for the device, bfloat16, compiled models."""

import copy
from functools import partial

import pytest
import torch
from optimizers import OPTIMIZERS, Mixed, each_optimizer, first_factor, is_fresh
from torch import nn

from tn_kfac import KFAC, SINGD

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script"),
]

STRUCTURES = ("dense", "diagonal", "block4diagonal", "triltoeplitz", "triutoeplitz",
              "hierarchical2_3", "triltopleftdiag", "triubottomrightdiag", "auto")  # fmt: skip
WITHOUT_LENGTH = {"update_rms": None, "nesterov": False}
OPTIONS = {
    "plain": {},
    "reduce, IKFAC": {"kfac_approx": "reduce", "kfac_like": True},
    "normalised": {"normalize_lr_cov": True, "T": 2},
    "grafted": {"graft": "adamw", "decoupled_weight_decay": True, **WITHOUT_LENGTH},
    "clipped": {"kl_clip": 1e-3, "precondition": "momentum", "weight_decay": 0.1},
    "started": {"init": "curvature", "curvature_fraction": 1 / 2, "update_rms": 0.2},
    "adamw fallback": {"fallback": "adamw"},
}
NEWTON = {"inverse": "newton-schulz", "T_inverse": 1}
KFAC_OPTIONS = {
    "Newton-Schulz": NEWTON,
    "Newton-Schulz, reduce": NEWTON | {"kfac_approx": "reduce", "damping_mode": "each"},
    "Newton-Schulz, roots": NEWTON | {"exponent": 1 / 2},
    "Newton-Schulz, blocks": NEWTON | {"structure": "block4diagonal"},
    "Newton-Schulz, grafted": NEWTON | {"graft": "adamw", "decoupled_weight_decay": True},
    "Newton-Schulz, staggered": NEWTON | {"T_inverse": 3, "stagger": True},
    "Newton-Schulz, momentum": NEWTON | {"precondition": "momentum", "weight_decay": 0.1},
    "diagonal": {"structure": "diagonal", "T_inverse": 1},
    "EKFAC, diagonal": {"structure": "diagonal", "T_inverse": 1, "ekfac": True},
    "between eigh": {},
    "between Cholesky": {"inverse": "cholesky"},
    "between eigh, EKFAC": {"ekfac": True},
    "between eigh, EKFAC of the batch": {"ekfac": "ema"},
}
"""What must not wait. `eigh` and Cholesky do: the host reads whether they failed. So theirs come
before the steps that are watched; those of a diagonal decompose nothing."""
ON_BOTH = {
    **{f"SINGD {name}": partial(SINGD, structure=name, T=1) for name in STRUCTURES},
    **{name: build for name, build in OPTIMIZERS.items() if build.kind is KFAC},
    "KFAC cholesky": partial(OPTIMIZERS["KFAC"], inverse="cholesky"),
    "KFAC blocks": partial(OPTIMIZERS["KFAC"], structure="block4diagonal"),
}


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, groups=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, padding=1, groups=4), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(32, 10),
    ).cuda()  # fmt: skip


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(step)
    x = torch.randn(16, 3, 12, 12, device="cuda", generator=generator)
    return x, torch.randint(0, 10, (16,), device="cuda", generator=generator)


def run(model, optimizer, steps, waits=True, autocast=False):
    for step in steps:
        x, y = batch(step)
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            loss = nn.functional.cross_entropy(model(x), y)
        torch.cuda.set_sync_debug_mode("default" if waits else "error")
        try:
            loss.backward()
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_nothing_waits_for_the_device(structure, options):
    """Backward passes and steps, after the first ones have planned and allocated."""
    model = small()
    check_no_wait(model, SINGD(model, structure=structure, **({"T": 1} | options)))


@pytest.mark.parametrize("options", KFAC_OPTIONS.values(), ids=KFAC_OPTIONS)
def test_nothing_waits_for_the_device_in_kfac(options):
    """The same, with factors in every step, and inverses where none of them waits."""
    model = small()
    check_no_wait(model, KFAC(model, **({"T_inverse": lambda step: 10} | options)))


def check_no_wait(model, optimizer):
    run(model, optimizer, range(2))
    run(model, optimizer, range(2, 5), waits=False)
    assert all(p.isfinite().all() for p in model.parameters())
    assert not is_fresh(first_factor(optimizer.state[model[0].weight]).cpu())


@pytest.mark.parametrize("build", ON_BOTH.values(), ids=ON_BOTH)
def test_equals_the_cpu(build):
    """In float64, to rounding."""
    model = small().double()
    twin = copy.deepcopy(model).cpu()
    pair = [(model, build(model)), (twin, build(twin))]
    for step in range(4):
        x, y = batch(step)
        for net, optimizer in pair:
            device = next(net.parameters()).device
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x.double().to(device)), y.to(device)).backward()
            optimizer.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.cpu(), q, rtol=1e-9, atol=1e-10)


@each_optimizer
@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_model_equals_eager(build, autocast):
    """The default backend, with no graph break; bfloat16 agrees as far as it can."""
    model = small()
    twin = copy.deepcopy(model)
    optimizer, oracle = build(model, gentle=autocast), build(twin, gentle=autocast)
    wrapped = torch.compile(model, fullgraph=True)
    run(wrapped, optimizer, range(3), autocast=autocast)
    run(twin, oracle, range(3), autocast=autocast)
    close = {"rtol": 5e-2, "atol": 2e-2} if autocast else {"rtol": 1e-3, "atol": 1e-4}
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, **close)
    assert not is_fresh(first_factor(optimizer.state[model[0].weight]).cpu())


@each_optimizer
@pytest.mark.parametrize("unscales", [False, True])
def test_float16_with_a_scaler(build, unscales):
    """As in float32, roughly; with a clip in between if gradients are unscaled."""
    model = small()
    twin = copy.deepcopy(model)
    optimizer, oracle = (build(net, lr=0.01, gentle=True) for net in (model, twin))
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    for step in range(4):
        x, y = batch(step)
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        if unscales:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1e6)
        scaler.step(optimizer)
        scaler.update()
    run(twin, oracle, range(4))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=5e-2, atol=2e-2)


@each_optimizer
def test_mixed_model(build):
    """Parameters of every kind, on the device."""
    model = Mixed().cuda()
    optimizer = build(model)
    x, y = torch.rand(8, 1, 8, 8, device="cuda"), torch.arange(8, device="cuda")
    nn.functional.cross_entropy(model(x), y).backward()
    before = [p.clone() for p in model.parameters()]
    optimizer.step()
    assert not any(map(torch.equal, before, model.parameters()))
