"""Every argument out of range is named in the error, and then nothing is hooked."""

import inspect
from typing import Any

import pytest
import torch
from optimizers import Mixed, hooks_on
from torch import nn

from tn_kfac import KFAC, SINGD
from tn_kfac.structures import Dense, Diagonal

NAN, INF = float("nan"), float("inf")
NOT_NUMBERS = [(value, TypeError) for value in ("0.1", None, True, [0.1], 1j)]
NOT_POSITIVE = [(value, ValueError) for value in (-1e-9, -1, NAN, INF, -INF)]
NOT_POSITIVE_OR_NONE = [*((v, e) for v, e in NOT_NUMBERS if v is not None), *NOT_POSITIVE,
                        (0, ValueError)]  # fmt: skip
NOT_FLAGS = [(value, TypeError) for value in (0, 1, None, "yes")]

BAD: dict[str, list[tuple[Any, type[Exception]]]] = {
    "lr": [*NOT_NUMBERS, *NOT_POSITIVE, (torch.tensor(-0.1), ValueError),
           (torch.tensor(NAN), ValueError), (torch.ones(2), (TypeError, ValueError))],
    "momentum": [*NOT_NUMBERS, *NOT_POSITIVE, (1.0, ValueError), (1.5, ValueError)],
    "damping": [((*v,) if isinstance(v, list) else v, (TypeError, ValueError))
                for v, _ in NOT_NUMBERS + NOT_POSITIVE],
    "alpha1": [*NOT_NUMBERS, *NOT_POSITIVE, (1.0, ValueError)],
    "weight_decay": NOT_NUMBERS + NOT_POSITIVE,
    "T": [(1.0, TypeError), ("1", TypeError), (None, TypeError), (True, TypeError),
          (0, ValueError), (-3, ValueError)],
    "loss_average": [("mean", ValueError), (True, ValueError), ("sequence", ValueError)],
    "T_inverse": [(1.0, TypeError), ("1", TypeError), (None, TypeError), (0, ValueError)],
    "lag": [(1.0, TypeError), ("1", TypeError), (None, TypeError), (True, TypeError),
            (-1, ValueError), (10, ValueError)],
    "factor_decay": [*NOT_NUMBERS, *NOT_POSITIVE, (1.0, ValueError)],
    "inverse": [("svd", ValueError), (None, ValueError), (1, ValueError)],
    "damping_mode": [("pi", ValueError), (True, ValueError), (1, ValueError)],
    "ekfac": [("adam", ValueError), (None, ValueError), (2, ValueError)],
    "stagger": NOT_FLAGS,
    "max_dim": [(1.0, TypeError), ("1", TypeError), (True, TypeError), (0, ValueError)],
    "beyond_max_dim": [("dense", ValueError), (None, ValueError)],
    "adaptive": [("speed", ValueError), (None, ValueError), (("lr", "T"), ValueError)],
    "lr_cov": NOT_NUMBERS + NOT_POSITIVE,
    "structure": [("wide", ValueError), ("", ValueError), (("dense",) * 3, ValueError),
                  (("dense",), ValueError), ((), ValueError), (("dense", "wide"), ValueError),
                  (1, TypeError), (("dense", None), TypeError), (Dense, TypeError),
                  ({}, ValueError), ({"head": "dense"}, ValueError), ({3: "dense"}, TypeError),
                  ({"*": "dense", "no such layer": "dense"}, ValueError),
                  ({"*": {"*": "dense"}}, TypeError), ("block0diagonal", ValueError),
                  ("auto0", ValueError)],
    "structures": [("wide", ValueError), (("dense",) * 3, ValueError), (("dense", 2), TypeError)],
    "kfac_approx": [("expnad", ValueError), (None, ValueError), (1, ValueError)],
    "fisher": [("true", ValueError), ("type2", ValueError), (None, ValueError), (2, ValueError)],
    "norms": NOT_FLAGS,
    "warn_unsupported": NOT_FLAGS,
    "kfac_like": NOT_FLAGS,
    "preconditioner_dtype": [("float32", TypeError), (torch.int32, ValueError),
                             ((torch.float32,) * 3, ValueError), ((torch.float32, 1), TypeError),
                             (torch.complex64, ValueError)],
    "init_grad_scale": NOT_NUMBERS + NOT_POSITIVE,
    "normalize_lr_cov": NOT_FLAGS,
    "nesterov": NOT_FLAGS,
    "average_momentum": NOT_FLAGS,
    "decoupled_weight_decay": NOT_FLAGS,
    "precondition": [("update", ValueError), (None, ValueError), (1, ValueError)],
    "exponent": [(2, ValueError), (0, ValueError), ("1", ValueError), (None, ValueError)],
    "graft": [("adam", ValueError), (True, ValueError), (1, ValueError)],
    "update_rms": NOT_POSITIVE_OR_NONE,
    "kl_clip": NOT_POSITIVE_OR_NONE,
    "warmup": [(-1, ValueError), (1.0, TypeError), (True, TypeError), (None, TypeError)],
    "init": [("zeros", ValueError), (None, ValueError), (1, ValueError)],
    "factor_clip": NOT_POSITIVE_OR_NONE,
    "curvature_fraction": [*NOT_NUMBERS, *NOT_POSITIVE, (0, ValueError), (2, ValueError),
                           (0.3, ValueError), (2 / 3, ValueError)],
    "share_inverses": [("factors", ValueError), (None, ValueError), (2, ValueError)],
    "share_updates": [("inverses", ValueError), (None, ValueError), (True, ValueError)],
    "process_group": [(True, TypeError), (0, TypeError), ("gloo", TypeError)],
    "reduce_dtype": [
        (torch.float16, ValueError),
        *((value, TypeError) for value in (torch.int32, torch.complex64, torch.float8_e4m3fn,
                                           "bfloat16", float, True, torch.ones(2),
                                           [torch.bfloat16])),
    ],
    "fallback": [("adam", ValueError), (True, ValueError), (0, ValueError)],
    "fallback_lr": [entry for entry in NOT_NUMBERS + NOT_POSITIVE if entry[0] is not None],
    "fallback_weight_decay": [e for e in NOT_NUMBERS + NOT_POSITIVE if e[0] is not None],
}  # fmt: skip
ARGUMENTS = {kind: set(inspect.signature(kind).parameters) for kind in (SINGD, KFAC)}
CASES = [
    pytest.param(kind, name, value, error, id=f"{kind.__name__}-{name}-{value!r:.20}")
    for kind, arguments in ARGUMENTS.items()
    for name in sorted(arguments & set(BAD))
    for value, error in BAD[name]
]


def test_no_argument_is_left_out():
    """A new argument must come with its bad values."""
    assert {*BAD, "model", "params"} == set.union(*ARGUMENTS.values())


@pytest.mark.parametrize(("kind", "name", "value", "error"), CASES)
def test_bad_value_is_named(kind, name, value, error):
    """The error starts from the argument's name, so a user finds it."""
    model = Mixed()
    with pytest.raises(error, match=name.removesuffix("s") if name == "structures" else name):
        kind(model, **{name: value})
    assert hooks_on(model) == 0


GROUP_KEYS = BAD.keys() - {
    "process_group",
    "reduce_dtype",
    "share_inverses",
    "share_updates",
    "norms",
    "warn_unsupported",
    "init_grad_scale",
    "structures",
}
each_key = pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind, own in ARGUMENTS.items() for name in sorted(own & GROUP_KEYS)],
)


@each_key
def test_bad_value_in_a_group_is_named(kind, name):
    """Groups are checked like arguments; the good group before it is not hooked either."""
    model = Mixed()
    value, error = BAD[name][0]
    groups = [
        {"params": model.head.parameters()},
        {"params": model.conv.parameters(), name: value},
    ]
    with pytest.raises(error, match=name):
        kind(model, groups)
    assert hooks_on(model) == 0


def _bad_params(model: Mixed) -> dict[str, tuple[Any, type[Exception], str]]:
    weight = model.head.weight
    return {
        "a lone tensor": (weight, TypeError, "params must be an iterable"),
        "no iterable": (3, TypeError, "params must be an iterable.*3"),
        "nothing": ([], ValueError, "params is empty"),
        "an exhausted generator": (iter(()), ValueError, "params is empty"),
        "a number": ([1.0], TypeError, "params must hold tensors"),
        "a parameter twice": ([weight, weight], ValueError, "more than once"),
        "a parameter in two groups": (
            [{"params": [weight]}, {"params": [weight]}], ValueError, "more than once"
        ),
        "a parameter of another model": (Mixed().parameters(), ValueError, "not a parameter"),
        "a set": ([{"params": {weight}}], TypeError, "ordered"),
        "a group without params": ([{"lr": 0.1}], ValueError, "params.*0.1"),
        "a module": (model, TypeError, "params|iterable"),
        "a group among parameters": ([weight, {"params": []}], TypeError, "params"),
    }  # fmt: skip


@pytest.mark.parametrize("case", _bad_params(Mixed()))
def test_bad_params_are_explained(case):
    """What `params` may not be, and what to pass instead."""
    model = Mixed()
    params, error, message = _bad_params(model)[case]
    with pytest.raises(error, match=message):
        SINGD(model, params)
    assert hooks_on(model) == 0


@pytest.mark.parametrize("model", [None, [nn.Linear(2, 2)], nn.Linear, "model"], ids=str)
def test_model_must_be_a_module(model):
    """Parameters in the place of the model are the likely mistake."""
    with pytest.raises(TypeError, match="model must be"):
        SINGD(model)


def test_model_without_parameters():
    with pytest.raises(ValueError, match="params is empty"):
        SINGD(nn.ReLU())


def test_structure_and_structures_exclude_each_other():
    model = Mixed()
    with pytest.raises(ValueError, match="structure='dense' and structures="):
        SINGD(model, structure="dense", structures=("dense", "dense"))
    assert hooks_on(model) == 0


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("structure", "dense", ("dense", "dense")),
        ("structure", Dense(), ("dense", "dense")),
        ("structure", ("dense", Diagonal()), ("dense", "diagonal")),
        ("structure", ["dense", "diagonal"], ("dense", "diagonal")),
        ("structures", ("diagonal", "dense"), ("diagonal", "dense")),
        ("structure", None, ("diagonal", "diagonal")),
    ],
)
def test_ways_to_name_structures(option, value, expected):
    """A name, a spec or a pair; diagonal by default."""
    optimizer = SINGD(Mixed(), **{option: value})
    assert optimizer.param_groups[0]["structure"] == expected


@pytest.mark.parametrize("value", [0, 0.0, 1, 0.5, 1e-30, torch.tensor(0.1)], ids=str)
def test_numbers_of_any_kind_are_taken(value):
    """Zero, integers and tensors of one element are numbers."""
    optimizer = SINGD(Mixed(), lr=value, fallback_lr=value)
    assert all(group["lr"] == value for group in optimizer.param_groups)
