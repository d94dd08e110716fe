"""Training habits around one step: closures, accumulation, clipping, bad batches, GANs."""

import copy
import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizers import (
    Mixed,
    copied,
    each_optimizer,
    factors_of,
    first_factor,
    is_fresh,
    loss_of,
    train,
)
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.utils import clip_grad_norm_, clip_grad_value_


def _twins(dtype: torch.dtype = torch.float64) -> tuple[Mixed, Mixed]:
    """Two equal models, whose batch norm does not couple the samples of a batch."""
    model = Mixed().to(dtype)
    model.norm.eval()
    return model, copy.deepcopy(model)


def _states(optimizer) -> Iterator[Tensor]:
    for state in optimizer.state.values():
        yield from (torch.as_tensor(value) for value in state.values())


def _assert_same(model, optimizer, twin, oracle, **tolerance) -> None:
    """Parameters and state, bit by bit where no tolerance is given."""
    pairs = [*zip(model.parameters(), twin.parameters(), strict=True)]
    pairs += zip(_states(optimizer), _states(oracle), strict=True)
    assert len(pairs) > len(list(model.parameters()))
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, **({"rtol": 0, "atol": 0} | tolerance))


def _zero_by_optimizer(model: nn.Module, optimizer) -> None:
    optimizer.zero_grad()


def _zero_by_model(model: nn.Module, optimizer) -> None:
    model.zero_grad()


def _zero_in_place(model: nn.Module, optimizer) -> None:
    optimizer.zero_grad(set_to_none=False)


ZEROS: dict[str, Callable] = {
    "optimizer": _zero_by_optimizer, "model": _zero_by_model, "in place": _zero_in_place,
}  # fmt: skip


@each_optimizer
@settings(max_examples=12)
@given(
    evaluations=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    zero=st.sampled_from(list(ZEROS.values())),
    interval=st.integers(1, 3),
    fallback=st.sampled_from(["sgd", "adamw"]),
)
def test_last_evaluation_of_a_closure_counts(digits, build, evaluations, zero, **options):
    """As L-BFGS or a line search evaluates: on any batches, gradients zeroed in between."""
    options = {"T": options["interval"], "fallback": options["fallback"]}
    torch.manual_seed(0)
    model, twin = _twins()
    optimizer, oracle = build(model, **options), build(twin, **options)

    def closure(batch: int) -> Tensor:
        zero(model, optimizer)
        loss = loss_of(model, digits, batch)
        loss.backward()
        return loss

    def every(step: int) -> Tensor:
        for batch in evaluations:
            closure(batch + step)
        return closure(step)

    losses = [optimizer.step(lambda step=step: every(step)).item() for step in range(4)]
    assert losses == train(twin, oracle, digits, range(4))
    _assert_same(model, optimizer, twin, oracle)


@each_optimizer
@pytest.mark.parametrize("order", ["zero, forward, backward", "forward, zero, backward"])
def test_closure_that_returns_no_tensor(digits, build, order):
    """A float, or None; and zero_grad between forward and backward pass, as Lightning has it."""
    model, twin = _twins()
    optimizer, oracle = build(model), build(twin)

    def closure(step: int) -> float | None:
        if order.startswith("zero"):
            optimizer.zero_grad()
        loss = loss_of(model, digits, step)
        if order.startswith("forward"):
            optimizer.zero_grad()
        loss.backward()
        return loss.item() if step % 2 else None

    losses = [optimizer.step(lambda step=step: closure(step)) for step in range(4)]
    expected = train(twin, oracle, digits, range(4))
    assert losses == [None, expected[1], None, expected[3]]
    _assert_same(model, optimizer, twin, oracle)


@each_optimizer
def test_sharpness_aware_steps(digits, build):
    """SAM: gradients at p + e, whose curvature counts, applied to p; those at p are dropped."""
    model, twin = _twins()
    optimizer, oracle = build(model), build(twin)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, digits, step).backward()
        before = copied(model)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(p.grad, alpha=0.05 / p.grad.norm().item())
        shifted = copied(model)
        optimizer.zero_grad()
        loss_of(model, digits, step).backward()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(before[name])
        optimizer.step()

        twin.load_state_dict(twin.state_dict() | shifted)
        oracle.zero_grad()
        loss_of(twin, digits, step).backward()
        twin.load_state_dict(twin.state_dict() | before)
        oracle.step()
    _assert_same(model, optimizer, twin, oracle)
    assert not is_fresh(first_factor(optimizer.state[model.head.weight]))


def _accumulated(model: nn.Module, digits, step: int, cuts: list[int], average: str | None) -> None:
    """Backward passes through micro-batches of a batch of 12; the loss is one of the batch."""
    first, last = 12 * step, 12 * step + 12
    bounds = [first, *(first + cut for cut in cuts), last]
    for low, high in pairwise(bounds):
        outputs, targets = model(digits[0][low:high]), digits[1][low:high]
        total = nn.functional.cross_entropy(outputs, targets, reduction="sum")
        (total / 12 if average else total).backward()


@each_optimizer
@settings(max_examples=12)
@given(
    cuts=st.lists(st.integers(1, 11), unique=True, max_size=4).map(sorted),
    average=st.sampled_from(["batch", None]),
    approx=st.sampled_from(["expand", "reduce"]),
    interval=st.integers(1, 3),
    fallback=st.sampled_from(["sgd", "adamw"]),
    clip=st.sampled_from([None, 0.1, 10.0]),
)
def test_micro_batches_equal_one_batch(
    digits, build, cuts, average, approx, interval, fallback, clip
):
    """Of any sizes, with a mean or a sum loss; the accumulated gradient may be clipped."""
    options = {"loss_average": average, "kfac_approx": approx, "T": interval}
    options |= {"fallback": fallback, "lr": 1e-2 if average else 1e-3, "gentle": True}
    torch.manual_seed(0)
    model, twin = _twins()
    optimizer, oracle = build(model, **options), build(twin, **options)
    before = copied(model)
    for step in range(3):
        for part, own, where in ((model, optimizer, cuts), (twin, oracle, [])):
            own.zero_grad()
            _accumulated(part, digits, step, where, average)
            if clip is not None:
                clip_grad_norm_(part.parameters(), clip)
            own.step()
    _assert_same(model, optimizer, twin, oracle, rtol=1e-5, atol=1e-8)
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())


CLIPS: dict[str, Callable] = {
    "norm": lambda model: clip_grad_norm_(model.parameters(), 0.02),
    "norm foreach": lambda model: clip_grad_norm_(model.parameters(), 0.02, foreach=True),
    "norm of a list": lambda model: clip_grad_norm_(list(model.parameters()), 0.02, math.inf),
}


@each_optimizer
@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
def test_clipped_gradients_shorten_the_step_alone(digits, build, clip):
    """Without momentum and lengths the step shrinks as gradients did; factors are the same."""
    model, twin = _twins()
    options = {"momentum": 0.0, "update_rms": None, "fallback": "sgd"}
    optimizer, oracle = build(model, **options), build(twin, **options)
    before = copied(model)
    for part, own in ((model, optimizer), (twin, oracle)):
        loss_of(part, digits, 0).backward()
        if part is model:
            full = part.head.weight.grad.clone()
            clip(part)
            shrunk = (part.head.weight.grad.norm() / full.norm()).item()
        own.step()
    assert 0 < shrunk < 0.9
    assert all(map(torch.equal, _states(optimizer), _states(oracle)))
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        expected = before[name] + shrunk * (q.detach() - before[name])
        torch.testing.assert_close(p.detach(), expected, rtol=1e-9, atol=1e-12)


@each_optimizer
def test_clipped_values(digits, build):
    """clip_grad_value_ to nothing: parameters stay, factors move as they would have."""
    model, twin = _twins()
    optimizer, oracle = build(model), build(twin)
    before = copied(model)
    for part, own in ((model, optimizer), (twin, oracle)):
        loss_of(part, digits, 0).backward()
        clip_grad_value_(part.parameters(), 0.0 if part is model else math.inf)
        own.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    states = (optimizer.state[model.conv.weight], oracle.state[twin.conv.weight])
    for ours, theirs in zip(*map(factors_of, states), strict=True):
        assert torch.equal(ours, theirs) and not is_fresh(ours)


def _spoilt(digits, value: float) -> tuple[Tensor, Tensor]:
    """The same data, with one bad pixel in the third batch of eight."""
    images = digits[0].clone()
    images[17, 0, 7, 7] = value
    return images, digits[1]


@each_optimizer
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scaler_skips_a_batch_with_bad_inputs(digits, build, value):
    """NaN in the data: parameters and state stay bit by bit; the next steps are as without it."""
    model, twin = _twins(torch.float32)
    optimizer, oracle = build(model), build(twin)
    scaler = GradScaler("cpu", init_scale=2.0**8, growth_interval=1000)
    bad = _spoilt(digits, value)
    for step in range(5):
        optimizer.zero_grad()
        before, state = copied(model), [value.clone() for value in _states(optimizer)]
        scaler.scale(loss_of(model, bad, step)).backward()
        scaler.step(optimizer)
        scaler.update()
        same = [torch.equal(p, before[name]) for name, p in model.named_parameters()]
        assert all(same) if step == 2 else not any(same)
        if step == 2:
            assert all(map(torch.equal, _states(optimizer), state))
            assert scaler.get_scale() == 2.0**7
    train(twin, oracle, digits, [0, 1, 3, 4])
    _assert_same(model, optimizer, twin, oracle, rtol=1e-3, atol=1e-5)
    assert all(value.isfinite().all() for value in _states(optimizer))


@each_optimizer
@pytest.mark.parametrize("zero", ZEROS.values(), ids=ZEROS)
def test_user_skips_a_bad_batch(digits, build, zero):
    """`if not norm.isfinite(): zero_grad(); continue`, without a scaler, leaves no trace."""
    model, twin = _twins(torch.float32)
    optimizer, oracle = build(model), build(twin)
    bad = _spoilt(digits, math.nan)
    skipped = []
    for step in range(5):
        loss_of(model, bad, step).backward()
        norm = clip_grad_norm_(model.parameters(), 1e9)
        if norm.isfinite():
            optimizer.step()
        else:
            skipped.append(step)
        zero(model, optimizer)
    assert skipped == [2]
    train(twin, oracle, digits, [0, 1, 3, 4])
    _assert_same(model, optimizer, twin, oracle)
