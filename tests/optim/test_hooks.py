"""Hooks: on the layers that are trained, once each, until the optimizer is closed."""

import copy
import warnings

import pytest
import torch
from optimizers import Mixed, each_optimizer, hooks_on, loss_of, train
from torch import nn


@each_optimizer
def test_only_layers_with_factors_are_hooked(digits, build):
    """conv, embedding, head and the model itself; nothing else, and no more while training."""
    model = Mixed()
    optimizer = build(model)
    assert hooks_on(model.conv) == hooks_on(model.head) > 0
    assert hooks_on(model.embedding) > 0
    assert hooks_on(model.norm) == hooks_on(model.table) == 0
    installed = hooks_on(model)
    train(model, optimizer, digits, range(2))
    assert hooks_on(model) == installed


@each_optimizer
def test_close_removes_every_hook(digits, build):
    """Afterwards the model is as it was, and forms no statistics."""
    model = Mixed()
    model.head.register_forward_hook(lambda *_: None)
    optimizer = build(model)
    train(model, optimizer, digits, range(1))
    assert hooks_on(model) > 1
    optimizer.close()
    assert hooks_on(model) == 1, "the user's own hook stays"
    loss_of(model, digits, 0).backward()
    assert all(binding.tap.factors() is None for binding in optimizer._bindings)
    optimizer.close()  # once more does no harm
    with pytest.raises(RuntimeError, match="closed"):
        optimizer.step()
    assert hooks_on(model) == 1


@each_optimizer
def test_hooks_of_groups_added_later_are_removed_too(build):
    model = Mixed()
    optimizer = build(model, model.head.parameters())
    optimizer.add_param_group({"params": model.conv.parameters()})
    assert len(model.conv._forward_hooks) == 1
    optimizer.close()
    assert hooks_on(model) == 0


@each_optimizer
def test_context_manager_closes(digits, build):
    """`with build(model) as optimizer:` closes at its end, and after an exception."""
    model = Mixed()
    with build(model) as optimizer:
        train(model, optimizer, digits, range(1))
        assert hooks_on(model) > 0
    assert hooks_on(model) == 0
    with pytest.raises(ArithmeticError, match="inside"), build(model):
        raise ArithmeticError("inside")
    assert hooks_on(model) == 0


@each_optimizer
def test_next_optimizer_starts_anew(digits, build):
    """A second optimizer, after the first is closed, acts as on an untouched model."""
    model = Mixed()
    twin = copy.deepcopy(model)
    build(model).close()
    expected = train(twin, build(twin), digits, range(3))
    assert train(model, build(model), digits, range(3)) == expected


@each_optimizer
def test_two_optimizers_share_a_model(digits, build):
    """Each trains its own layers; together they do what one with two groups does."""
    model = Mixed().double()
    twin = copy.deepcopy(model)
    parts = [[*m.conv.parameters(), *m.norm.parameters()] for m in (model, twin)]
    rest = [
        [p for part in (m.head, m.embedding, m.table) for p in part.parameters()]
        for m in (model, twin)
    ]
    one = build(twin, [{"params": parts[1]}, {"params": rest[1], "lr": 0.01}])
    two = [build(model, parts[0]), build(model, rest[0], lr=0.01)]
    expected = train(twin, one, digits, range(4))
    losses = []
    for step in range(4):
        model.zero_grad()
        loss = loss_of(model, digits, step)
        loss.backward()
        for optimizer in two:
            optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx(expected, rel=1e-12)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


@each_optimizer
def test_warning_that_is_an_error_leaves_no_hooks(build):
    """Under -W error the constructor fails; a failed constructor has hooked nothing."""
    model = Mixed()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="will not be trained"):
            build(model, fallback=None)
    assert hooks_on(model) == 0


@each_optimizer
def test_weights_shared_in_another_way_are_named(build):
    """An embedding that shares a Linear's weight leaves it without factors, with a warning."""

    class TiedEmbedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(7, 4)
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.embedding.weight

    model = TiedEmbedding()
    with pytest.warns(UserWarning, match=r"'embedding' shares parameters with .*head") as caught:
        optimizer = build(model, fallback="sgd")
    assert caught[0].filename == build.__call__.__code__.co_filename, (
        "the warning points at the caller"
    )
    assert [group["rule"] for group in optimizer.param_groups] == ["sgd"]
    assert hooks_on(model.head) == 0
