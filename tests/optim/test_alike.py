"""Layers of equal shapes are computed as one, and it makes no difference but in time."""

import copy
import warnings
from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tn_kfac import KFAC
from tn_kfac.optim import alike

DTYPE = torch.float64


class Block(nn.Module):
    """Two layers with a bias, and a norm, around a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).tanh())


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, padding=1), nn.Conv1d(4, 4, 3, padding=1, groups=2),
        nn.Conv1d(4, 4, 3, padding=1, groups=2), nn.Flatten(0, 0), *(Block() for _ in range(3)),
        nn.Flatten(), nn.Linear(16, 3),
    ).to(DTYPE)  # fmt: skip


def train(model: nn.Module, optimizer: KFAC, steps: range, spoil: int | None = None) -> None:
    """Steps on batches of their own; what is measured of one block at `spoil` is not finite.

    Batches are so large that factors have full rank: rounding would decide about the eigenvectors
    of equal eigenvalues.
    """
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(40, 2, 4, generator=generator, dtype=DTYPE)
        y = torch.randn(40, 3, generator=generator, dtype=DTYPE)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        probe = optimizer._bindings[4].tap.probes[0]
        if step == spoil and probe.grad is not None:
            probe.grad.fill_(torch.nan)
        optimizer.step()


def parameters(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def trained(options: dict, spoil: int | None = None) -> Tensor:
    model = network()
    optimizer = KFAC(model, lr=1e-2, warn_unsupported=False, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="factors without an inverse")
        train(model, optimizer, range(6), spoil)
    return parameters(model)


OPTIONS = st.fixed_dictionaries(
    {
        "T": st.integers(1, 2),
        "T_inverse": st.sampled_from((1, 2, 10)),
        "damping": st.sampled_from((1e-2, 1e-1)),
        "precondition": st.sampled_from(("gradient", "momentum")),
        "update_rms": st.sampled_from((None, 0.1)),
        "norms": st.booleans(),
        "stagger": st.booleans(),
        "structure": st.sampled_from(("dense", "block3diagonal", "diagonal")),
        "warmup": st.integers(0, 2),
        "kfac_approx": st.sampled_from(("expand", "reduce")),
    }
)
KINDS = (
    {"inverse": "eigh"},
    {"inverse": "qr"},
    {"inverse": "cholesky"},
    {"inverse": "newton-schulz"},
    {"ekfac": "ema", "exponent": 0.5},
    {"ekfac": "exact"},
)


@settings(max_examples=25)
@given(OPTIONS, st.sampled_from(KINDS), st.sampled_from((None, 2, 4)))
def test_together_or_apart(options, kind, spoil):
    options = options | kind
    together = trained(options, spoil)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alike, "LARGE", 0)
        apart = trained(options, spoil)
    assert together.isfinite().all()
    torch.testing.assert_close(together, apart, rtol=1e-9, atol=1e-9)


class Products(TorchDispatchMode):
    """Counts batched matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten.bmm.default
        return function(*args, **(kwargs or {}))


class Calls(TorchDispatchMode):
    """Counts calls by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names[function._schema.name.removeprefix("aten::")] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("depth", [1, 5])
def test_as_many_calls_for_any_number_of_layers(depth):
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(depth)))
    optimizer = KFAC(model, T_inverse=100, warn_unsupported=False)
    for _ in range(3):
        model(torch.randn(6, 4)).sum().backward()
        with Products() as seen:
            optimizer.step()
    assert seen.count == 4  # to the eigenbasis and back


@pytest.mark.parametrize("precondition", ["gradient", "momentum"])
def test_elementwise_work_is_done_for_all_layers_at_once(precondition):
    """Each kind of layer costs its products and a few calls; directions lie as parameters do."""
    counts = []
    for widths in ((4, 6, 3), (4, 6, 3, 7, 9)):
        model = nn.Sequential(*(nn.Linear(*pair) for pair in pairwise(widths)))
        options = {"ekfac": "ema", "exponent": 0.5, "T": 10, "T_inverse": 10, "kl_clip": None}
        optimizer = KFAC(model, precondition=precondition, warn_unsupported=False, **options)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(6, 4)).sum().backward()
            with Calls() as seen:
                optimizer.step()
        counts.append(seen.names)
    more = {name: counts[1][name] - counts[0][name] for name in counts[1]}
    assert more["bmm"] == 2 * 6  # for each of the two new kinds
    assert all(added <= 0 for name, added in more.items() if name.startswith("_foreach"))


@pytest.mark.parametrize("structure", ["dense", "diagonal"])
def test_directions_lie_as_their_parameters_do(structure):
    model = nn.Sequential(nn.Embedding(5, 4), *(Block() for _ in range(3)), nn.Linear(4, 3))
    optimizer = KFAC(model, structure=structure, norms=True, warn_unsupported=False)
    directions: dict[Tensor, Tensor] = {}
    for step in range(2):
        optimizer.zero_grad()
        model(torch.arange(5)).sum().backward()
        with torch.no_grad():
            directions = optimizer._directions(optimizer._active()) if step else {}
        optimizer.step()
    assert len(directions) == len(list(model.parameters()))
    assert all(d.stride() == p.stride() and d.shape == p.shape for p, d in directions.items())


def test_states_lie_side_by_side_and_are_saved_apart():
    model = network()
    optimizer = KFAC(model, lr=1e-2, T_inverse=2, ekfac="ema", warn_unsupported=False)
    train(model, optimizer, range(3))
    first, second = (optimizer.state[block.up.weight] for block in (model[4], model[5]))
    for key in ("A", "G", "A_basis", "moments"):
        assert first[key].untyped_storage().data_ptr() == second[key].untyped_storage().data_ptr()
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        for value in state.values():
            if isinstance(value, Tensor):
                assert value.untyped_storage().nbytes() == value.nbytes
    twin = network()
    twin.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed = KFAC(twin, lr=1e-2, T_inverse=2, ekfac="ema", warn_unsupported=False)
    resumed.load_state_dict(saved)
    for pair in ((model, optimizer), (twin, resumed)):
        train(*pair, range(3, 6))
    assert torch.equal(parameters(model), parameters(twin))


@pytest.mark.parametrize("groups, skips", [(2, False), (1, True)])
def test_states_stay_where_they_are(groups, skips):
    """Neither groups that alternate nor a step that some layers miss has states moved for good."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    apart = [model[at::groups].parameters() for at in range(groups)]
    optimizer = KFAC(model, [{"params": list(own)} for own in apart], T_inverse=1)
    places = []
    for step in range(6):
        optimizer.zero_grad()
        (model[::2] if skips and step == 1 else model)(torch.randn(6, 4)).sum().backward()
        optimizer.step()
        states = [optimizer.state[layer.weight] for layer in model]
        places.append([s[key].data_ptr() for s in states for key in ("A", "G", "A_basis")])
    assert places[3] == places[4] == places[5]
