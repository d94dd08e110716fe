"""Each option of the update, against the plain rule written out on dense matrices."""

import math
from typing import Any

import pytest
import torch
from optimizers import copied, is_identity, joint, loss_of, train, two_layers
from torch import Tensor, nn

from benchmarks.published import PUBLISHED
from tn_kfac import KFAC, SINGD

COMMON = {"lr": 0.05, "T": 1, "fallback": None, "warn_unsupported": False}
OPTIONS = COMMON | {"lr_cov": 0.1}
PLAIN_KFAC = {"T_inverse": 1, "damping": 0.3, "damping_mode": "each", "kl_clip": None}
KINDS = {SINGD: PUBLISHED | OPTIONS, KFAC: COMMON | PLAIN_KFAC}
each_kind = pytest.mark.parametrize("kind", KINDS)


def preconditioner(state: dict) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """What multiplies a gradient from the left and from the right, and SINGD's K and C."""
    dense = lambda f: torch.diag(f) if f.dim() == 1 else f  # noqa: E731
    if "K" in state:
        K, C = (dense(state[key][0]).clone() for key in ("K", "C"))
        return C @ C.T, K @ K.T, {"K": K, "C": C}
    right, left = (dense(state[key][0]) / state["weight"] for key in ("A", "G"))
    damped = (m + 0.3 * torch.eye(len(m), dtype=m.dtype) for m in (left, right))
    return *map(torch.linalg.inv, damped), {}


def moved(model: nn.Module, optimizer, digits, step: int) -> list[dict[str, Any]]:
    """One step; what it did to each linear layer: gradient, direction without lr, factors."""
    optimizer.zero_grad()
    loss_of(model, digits, step).backward()
    layers = [m for m in model if isinstance(m, nn.Linear)]
    before = [(joint(layer), joint(layer, "data")) for layer in layers]
    optimizer.step()
    found = []
    for layer, (gradient, old) in zip(layers, before, strict=True):
        state = optimizer.state[layer.weight]
        left, right, factors = preconditioner(state)
        change = (old - joint(layer, "data")) / optimizer.param_groups[0]["lr"]
        own = {"g": gradient, "d": change, "old": old, "left": left, "right": right}
        found.append(own | {"plain": left @ gradient @ right} | factors)
    return found


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def steps(digits, count=4, kind=SINGD, **options):
    """(step, layer's findings) for a few steps."""
    model = two_layers()
    optimizer = kind(model, **(KINDS[kind] | options))
    for step in range(count):
        for at, layer in enumerate(moved(model, optimizer, digits, step)):
            yield step, at, layer


@each_kind
@pytest.mark.parametrize("structure", ["diagonal", "dense"])
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_and_weight_decay(digits, kind, structure, decoupled, nesterov):
    buffers = {}
    options = {"nesterov": nesterov, "decoupled_weight_decay": decoupled, "weight_decay": 0.3}
    for _, at, found in steps(digits, kind=kind, structure=structure, momentum=0.8, **options):
        along = found["plain"] + (0 if decoupled else 0.3 * found["old"])
        buffers[at] = 0.8 * buffers[at] + along if at in buffers else along
        expected = along + 0.8 * buffers[at] if nesterov else buffers[at]
        close(found["d"], expected + (0.3 * found["old"] if decoupled else 0))


@each_kind
@pytest.mark.parametrize("nesterov", [False, True])
def test_preconditioned_momentum(digits, kind, nesterov):
    """Momentum is of gradients, and is preconditioned with the newest factors."""
    buffers = {}
    options = {"precondition": "momentum", "momentum": 0.7, "nesterov": nesterov}
    for _, at, found in steps(digits, kind=kind, structure="dense", **options):
        buffers[at] = 0.7 * buffers[at] + found["g"] if at in buffers else found["g"]
        smooth = found["g"] + 0.7 * buffers[at] if nesterov else buffers[at]
        close(found["d"], found["left"] @ smooth @ found["right"])


@each_kind
@pytest.mark.parametrize("precondition", ["gradient", "momentum"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_averaged_momentum(digits, kind, precondition, nesterov):
    """b ← β b + (1 − β) g from 0, of gradients or of what was preconditioned."""
    buffers = {}
    options = {"precondition": precondition, "nesterov": nesterov, "average_momentum": True}
    for _, at, found in steps(digits, kind=kind, structure="dense", momentum=0.7, **options):
        new = found["plain" if precondition == "gradient" else "g"]
        buffers[at] = 0.7 * buffers.get(at, 0) + 0.3 * new
        smooth = 0.3 * new + 0.7 * buffers[at] if nesterov else buffers[at]
        plain = precondition == "gradient"
        close(found["d"], smooth if plain else found["left"] @ smooth @ found["right"])


@each_kind
@pytest.mark.parametrize("structure", ["diagonal", "dense", "block4diagonal"])
def test_length_of_sgd(digits, kind, structure):
    """graft="sgd": the direction is ours, the norm the gradient's."""
    model = two_layers()
    options = KINDS[kind] | {"structure": structure, "graft": "sgd", "momentum": 0.0}
    optimizer = kind(model, **options)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, digits, step).backward()
        layers = [m for m in model if isinstance(m, nn.Linear)]
        before = [(joint(layer).norm(), joint(layer, "data")) for layer in layers]
        optimizer.step()
        for layer, (norm, old) in zip(layers, before, strict=True):
            close((old - joint(layer, "data")).norm() / 0.05, norm)


@each_kind
def test_direction_of_grafted_steps_is_ours(digits, kind):
    for _, _, found in steps(digits, kind=kind, structure="dense", graft="sgd", momentum=0.0):
        unit = found["plain"] / found["plain"].norm()
        close(found["d"], unit * found["g"].norm())


@each_kind
def test_length_of_adamw(digits, kind):
    """graft="adamw": the norm of g / (√v̂ + ε); momentum averages, as Adam's first moment."""
    second, buffers = {}, {}
    options = {"structure": "dense", "graft": "adamw", "momentum": 0.9}
    for step, at, found in steps(digits, kind=kind, **options):
        second[at] = 0.999 * second.get(at, 0) + 0.001 * found["g"] ** 2
        adam = found["g"] / ((second[at] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
        along = found["plain"] / found["plain"].norm() * adam.norm()
        buffers[at] = 0.9 * buffers[at] + 0.1 * along if at in buffers else along
        close(found["d"], buffers[at])


@each_kind
def test_root_mean_square(digits, kind):
    for _, _, found in steps(digits, kind=kind, structure="dense", update_rms=0.2, momentum=0.0):
        assert found["d"].square().mean().sqrt().item() == pytest.approx(0.2)
        close(found["d"] / found["d"].norm(), found["plain"] / found["plain"].norm())


@each_kind
@pytest.mark.parametrize("factor", [0.0, 1e-30])
@pytest.mark.parametrize("options", [{"update_rms": 0.2}, {"graft": "sgd"}, {"graft": "adamw"}])
def test_no_gradient_is_no_update(digits, kind, options, factor):
    """Nor is one whose squares underflow: of it, nothing is lengthened to a whole step."""
    model = two_layers().float()
    optimizer = kind(model, **(KINDS[kind] | {"momentum": 0.0, "structure": "dense"} | options))
    before = copied(model)
    (loss_of(model, digits, 0) * factor).backward()
    optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name], rtol=0, atol=1e-3)


@each_kind
def test_kl_clip(digits, kind):
    """All layers shrink by the one factor min(1, √(κ / |lr² Σ ⟨d, g⟩|))."""
    shrunk = set()
    for kappa in (1e-6, 1e6):
        model = two_layers()
        options = KINDS[kind] | {"momentum": 0.0, "kl_clip": kappa}
        optimizer = kind(model, **(options | {"structure": "dense"}))
        for step in range(2):
            found = moved(model, optimizer, digits, step)
            change = 0.05**2 * sum((f["plain"] * f["g"]).sum() for f in found)
            factor = min(1.0, math.sqrt(kappa / abs(change)))
            shrunk.add(factor < 1)
            for layer in found:
                close(layer["d"], layer["plain"] * factor)
    assert shrunk == {True, False}


@each_kind
def test_kl_clip_of_products_that_overflow(digits, kind):
    """Finite gradients leave finite parameters."""
    model = two_layers().float()
    optimizer = kind(model, **(KINDS[kind] | {"kl_clip": 1e-3}))
    train(model, optimizer, digits, range(2))
    optimizer.zero_grad()
    (loss_of(model, digits, 2) * 1e25).backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


@each_kind
def test_warmup_follows_gradients_while_factors_form(digits, kind):
    for step, _, found in steps(digits, kind=kind, structure="dense", warmup=2, momentum=0.0):
        close(found["d"], found["g"] if step < 2 else found["plain"])
        assert not is_identity(found["left"][None]) and not is_identity(found["right"][None])


def test_root_exponent(digits):
    """A^-1/2 and G^-1/2 of diagonal factors."""
    for _, _, found in steps(digits, structure="diagonal", exponent=0.5, momentum=0.0):
        close(found["d"], found["C"].abs() @ found["g"] @ found["K"].abs())


def test_root_exponent_needs_diagonal_factors():
    with pytest.raises(ValueError, match=r"exponent=0\.5 needs diagonal factors, layer '1'"):
        SINGD(two_layers(), structure="dense", exponent=0.5)


def test_interval_by_a_callable(digits):
    """T(step) is the wait until the next update: at steps 0, 1, 3, 6."""
    seen, factors = [], {}
    for step, at, found in steps(digits, 8, structure="dense", T=lambda step: 1 + len(seen) // 2):
        if at not in factors or not torch.equal(factors[at], found["K"]):
            seen.append(step)
        factors[at] = found["K"]
    assert sorted(set(seen)) == [0, 1, 3, 6]


@pytest.mark.parametrize("ikfac", [False, True])
@pytest.mark.parametrize("structure", ["dense", "diagonal", "block4diagonal", "triltoeplitz"])
def test_start_at_the_first_curvature(digits, structure, ikfac):
    """init="curvature": SINGD's factors start where they would stay, were it always the same."""
    model = two_layers()
    options = {"structure": structure, "init": "curvature", "damping": 0.1, "kfac_like": ikfac}
    optimizer = SINGD(model, **(OPTIONS | options | {"lr": 0.0, "momentum": 0.0}))
    state, found = optimizer.state[model[1].weight], []
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model, digits, 0, 64).backward()
        optimizer.step()
        found.append({key: state[key].clone() for key in ("K", "C")})
    if structure == "triltoeplitz":  # no inverse root in the space: a multiple of I
        assert not found[0]["K"][0, 1:].any() and found[0]["K"][0, 0] != 1
        return
    for key, start in found[0].items():
        assert (found[1][key] - start).norm() < 2e-3 * start.norm(), key
        assert (found[1][key] - 1).norm() > 0.01


def test_failed_root_starts_at_a_multiple_of_the_identity(digits):
    """Without damping, a batch of fewer rows than columns has a singular factor."""
    model = two_layers()
    optimizer = SINGD(model, **OPTIONS, structure="dense", damping=0.0, init="curvature")
    train(model, optimizer, (digits[0][:32], digits[1][:32]), range(3))
    assert all(p.isfinite().all() for p in model.parameters())
    assert optimizer.state[model[1].weight]["K"].isfinite().all()


@pytest.mark.parametrize(("name", "value"), [("T", 0), ("T", 1.5), ("lr_cov", -1), ("lr_cov", "1")])
def test_callables_are_checked(digits, name, value):
    model = two_layers()
    optimizer = SINGD(model, **(OPTIONS | {name: lambda step: value}))
    with pytest.raises((TypeError, ValueError), match=name):
        train(model, optimizer, digits, [0])


def test_grafted_adamw_has_no_nesterov():
    with pytest.raises(ValueError, match="nesterov=True"):
        SINGD(two_layers(), graft="adamw", update_rms=None, nesterov=True)
    with pytest.raises(ValueError, match="average_momentum=True"):
        SINGD(two_layers(), graft="adamw", update_rms=None, nesterov=False, average_momentum=True)
    with pytest.raises(ValueError, match="graft='sgd' and update_rms"):
        SINGD(two_layers(), graft="sgd", update_rms=0.2)


def test_loss_spike_moves_factors_by_a_bounded_step(digits):
    """factor_clip: β₁ times the norm of m stays below 1; NaNs move nothing."""
    model = two_layers()
    optimizer = SINGD(model, **(OPTIONS | {"lr": 0.0}), structure="dense")
    train(model, optimizer, digits, range(2))
    state = optimizer.state[model[1].weight]
    for factor in (1e8, float("nan")):
        before = {key: state[key].clone() for key in ("K", "C", "m_K", "m_C")}
        optimizer.zero_grad()
        (loss_of(model, digits, 3) * factor).backward()
        with torch.no_grad():
            for p in model.parameters():
                p.grad.zero_()
        optimizer.step()
        for key, old in before.items():
            assert state[key].isfinite().all()
            if math.isnan(factor):
                assert torch.equal(state[key], old), key
    assert state["K"].diagonal(dim1=1, dim2=2).min() > 0.1
