"""Fisher matrices of the model's own distribution, against Hessians by autograd."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tapping import tapped
from torch import Tensor, nn

from tn_kfac.curvature.fisher import measure_fisher
from tn_kfac.curvature.likelihood import likelihood, loss_module

TIGHT = {"rtol": 1e-8, "atol": 1e-10}
REDUCTIONS = st.sampled_from(["mean", "sum"])


@st.composite
def losses(draw):
    """(loss, outputs, targets) with every option, positions behind classes or not."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    batch, classes = draw(st.integers(1, 3)), draw(st.integers(2, 4))
    shared = draw(st.lists(st.integers(1, 2), max_size=1))
    shape, reduction = (batch, classes, *shared), draw(REDUCTIONS)
    kind = draw(st.sampled_from(["cross_entropy", "soft", "mse", "bce"]))
    if kind == "mse":
        return nn.MSELoss(reduction=reduction), normal(*shape), normal(*shape)
    if kind == "bce":
        weight = normal(*shape[1:]).exp() if draw(st.booleans()) else None
        positive = normal(*shape[1:]).exp() if draw(st.booleans()) else None
        loss = nn.BCEWithLogitsLoss(weight, pos_weight=positive, reduction=reduction)
        return loss, normal(*shape), normal(*shape).sigmoid()
    weight = normal(classes).exp() if draw(st.booleans()) else None
    smoothing = draw(st.sampled_from([0.0, 0.1, 0.5]))
    loss = nn.CrossEntropyLoss(weight, label_smoothing=smoothing, reduction=reduction)
    if kind == "soft":
        return loss, normal(*shape), normal(*shape).softmax(1)
    targets = torch.randint(classes, (batch, *shared), generator=generator)
    loss.ignore_index = draw(st.sampled_from([-100, 0]))
    targets.flatten()[0] = 1  # one at least is not ignored
    return loss, normal(*shape), targets


def hessian_of(loss: nn.Module, outputs: Tensor, targets: Tensor) -> Tensor:
    """The Hessian of the loss in all outputs, (numel, numel)."""
    hessian = torch.autograd.functional.hessian(lambda f: loss(f, targets), outputs)
    return hessian.reshape(outputs.numel(), outputs.numel())


def divided(total: Tensor, terms: Tensor | float) -> Tensor:
    return total / terms if float(terms) else total


@settings(max_examples=150)
@given(losses())
def test_columns_are_a_square_root_of_the_hessian(drawn):
    """Exactly: examples apart, positions of an example apart."""
    loss, outputs, targets = drawn
    model = likelihood(loss, outputs, targets)
    total = torch.zeros(outputs.numel(), outputs.numel(), dtype=torch.float64)
    for column in model.columns():
        for n in range(len(outputs)):
            alone = torch.zeros_like(column)
            alone[n] = column[n]
            total += torch.outer(alone.flatten(), alone.flatten())
    torch.testing.assert_close(
        divided(total, model.terms), hessian_of(loss, outputs, targets), **TIGHT
    )


@settings(max_examples=15)
@given(losses(), st.integers(0, 2**16))
def test_samples_have_the_hessian_as_second_moment(drawn, seed):
    """Within five standard errors of every entry."""
    loss, outputs, targets = drawn
    model, generator = likelihood(loss, outputs, targets), torch.Generator().manual_seed(seed)
    draws = torch.stack([model.sample(generator).flatten() for _ in range(3000)])
    products = draws[:, :, None] * draws[:, None, :]
    error = divided(products.std(0) / 3000**0.5, model.terms)
    off = divided(products.mean(0), model.terms) - hessian_of(loss, outputs, targets)
    assert (off.abs() <= 5.5 * error + 1e-6).all()


class Net(nn.Module):
    """Two layers, the first with weight sharing, then a nonlinearity."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)).flatten(1))


def ggn_of_outputs(net: Net, x: Tensor, loss: nn.Module, targets: Tensor) -> Tensor:
    """Σ over examples and positions of the GGN in the first layer's output, (4, 4)."""
    y = net.first(x).detach()
    outputs = net.second(torch.tanh(y).flatten(1)).detach()
    hessian = hessian_of(loss, outputs, targets)
    jacobian = torch.autograd.functional.jacobian(
        lambda y: net.second(torch.tanh(y).flatten(1)).flatten(), y
    )
    total = torch.zeros(4, 4, dtype=torch.float64)
    for n in range(len(x)):
        for s in range(x.shape[1]):
            total += jacobian[:, n, s].T @ hessian @ jacobian[:, n, s]
    return total


LOSSES = [
    nn.CrossEntropyLoss(),
    nn.CrossEntropyLoss(reduction="sum", label_smoothing=0.1),
    nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64), ignore_index=2),
    nn.MSELoss(),
    nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0, dtype=torch.float64)),
]


def batch_for(loss: nn.Module, size: int = 5) -> tuple[Tensor, Tensor]:
    x = torch.randn(size, 2, 3, dtype=torch.float64)
    if isinstance(loss, nn.CrossEntropyLoss):
        return x, torch.arange(size) % 3
    return x, torch.rand(size, 3, dtype=torch.float64)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_type_2_is_the_ggn_in_the_outputs_of_a_layer(loss):
    net, (x, targets) = Net().double(), batch_for(loss)
    tap = tapped(net.first, fisher="type-2")
    measure_fisher([tap], net(x), loss, targets)
    factors = tap.factors()
    assert factors is not None
    torch.testing.assert_close(factors.G[0], ggn_of_outputs(net, x, loss, targets), **TIGHT)
    ones = torch.ones(10, 1, dtype=torch.float64)
    rows = torch.cat([x.reshape(-1, 3), ones], 1)
    torch.testing.assert_close(factors.A[0], rows.T @ rows / 10, **TIGHT)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_micro_batches_of_any_size_equal_one_batch(loss):
    """Also where class weights and ignored labels make parts count differently."""
    net, (x, targets) = Net().double(), batch_for(loss, 6)
    found = []
    for sizes in ([6], [1, 5], [2, 3, 1]):
        tap = tapped(net.first, fisher="type-2")
        for part, labels in zip(x.split(sizes), targets.split(sizes), strict=True):
            measure_fisher([tap], net(part), loss, labels)
        found.append(tap.factors())
        net.first._forward_hooks.clear()
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], **TIGHT)


def test_parameters_get_no_gradient_and_the_graph_is_kept():
    net, loss = Net().double(), nn.CrossEntropyLoss()
    x, targets = batch_for(loss)
    tap = tapped(net.first, fisher="mc")
    outputs = net(x)
    measure_fisher([tap], outputs, loss, targets, samples=3)
    assert all(p.grad is None for p in net.parameters())
    before = tap.factors()
    loss(outputs, targets).backward()
    after = tap.factors()
    assert before is not None and after is not None
    assert torch.equal(before.G, after.G) and torch.equal(before.A, after.A)
    plain = Net().double()
    plain.load_state_dict(net.state_dict())
    loss(plain(x), targets).backward()
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_forward_only_sets_the_output_factor_to_one():
    net = Net().double()
    x, targets = batch_for(LOSSES[0])
    tap = tapped(net.first, fisher="forward-only")
    (nn.functional.cross_entropy(net(x), targets) * 1e3).backward()
    factors = tap.factors()
    assert factors is not None
    torch.testing.assert_close(factors.G[0], torch.eye(4, dtype=torch.float64))


def test_named_losses_and_what_is_refused():
    assert isinstance(loss_module("mse"), nn.MSELoss)
    with pytest.raises(ValueError, match="loss='huber'"):
        loss_module("huber")
    with pytest.raises(ValueError, match="reduction='none'"):
        loss_module(nn.MSELoss(reduction="none"))
    with pytest.raises(TypeError, match="loss must be"):
        likelihood(nn.L1Loss(), torch.ones(2, 2), None)
    with pytest.raises(ValueError, match="pass targets"):
        likelihood(LOSSES[2], torch.ones(2, 3), None)
    tap = tapped(nn.Linear(2, 2).double(), fisher="mc")
    with pytest.raises(ValueError, match="gradients enabled"):
        measure_fisher([tap], torch.ones(2, 2), "mse")


def test_two_losses_on_one_forward_pass_add_up():
    """As the GGN of their sum does, each with its own mean."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 5, bias=False)
            self.first, self.second = nn.Linear(5, 3, bias=False), nn.Linear(5, 2, bias=False)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            z = self.body(x)
            return self.first(z), self.second(z)

    net, x = Heads().double(), torch.randn(7, 4, dtype=torch.float64)
    losses = nn.CrossEntropyLoss(), nn.MSELoss()
    targets = torch.arange(7) % 3, torch.randn(7, 2, dtype=torch.float64)
    tap = tapped(net.body, fisher="type-2")
    for part in (slice(0, 5), slice(5, 7)):
        for output, loss, target in zip(net(x[part]), losses, targets, strict=True):
            measure_fisher([tap], output, loss, target[part])
    expected = torch.zeros(5, 5, dtype=torch.float64)
    for head, output, loss, target in zip(
        (net.first, net.second), net(x), losses, targets, strict=True
    ):
        hessian = hessian_of(loss, output.detach(), target)
        blocks = hessian.reshape(7, output.shape[1], 7, output.shape[1])
        for n in range(7):
            expected += head.weight.T @ blocks[n, :, n] @ head.weight
    factors = tap.factors()
    assert factors is not None
    torch.testing.assert_close(factors.G[0], expected, **TIGHT)
    torch.testing.assert_close(factors.A[0], (x.T @ x) / 7, **TIGHT)


@pytest.mark.parametrize(
    ("loss", "shape"),
    [
        (nn.MSELoss(), (3, 7)),
        (nn.BCEWithLogitsLoss(), (3, 7)),
        (nn.CrossEntropyLoss(), (1, 3)),
        (nn.CrossEntropyLoss(), (9,)),
        (nn.CrossEntropyLoss(torch.ones(5)), (10,)),
    ],
    ids=str,
)
def test_targets_that_do_not_fit_are_refused(loss, shape):
    targets = torch.rand(shape) if len(shape) > 1 else torch.zeros(shape, dtype=torch.long)
    with pytest.raises(ValueError, match=r"targets has shape|the loss weights 5 classes"):
        likelihood(loss, torch.randn(10, 3), targets)
