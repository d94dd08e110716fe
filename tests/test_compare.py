"""The comparison of scripts/: every bad configuration in one line, one run in full."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from comparison.cli import main
from comparison.config import Comparison, Training
from comparison.report import summarize
from comparison.training import Run

ROOT = Path(__file__).resolve().parents[1]
COMPARE = [sys.executable, str(ROOT / "scripts" / "compare.py")]
SGD = {"name": "SGD", "class": "torch.optim.SGD", "args": {"lr": 0.1, "momentum": 0.9}}


def singd(**args):
    return {"name": "SINGD", "class": "tn_kfac.SINGD", "args": {"lr": 0.05, "T": 1, **args}}


@pytest.fixture
def arguments(tmp_path):
    """Write a configuration and return the command line that reads it."""

    def write(text_or_config):
        path = tmp_path / "config.yaml"
        is_text = isinstance(text_or_config, str)
        path.write_text(text_or_config if is_text else yaml.safe_dump(text_or_config))
        return ["--config", str(path), f"--output={tmp_path / 'runs'}"]

    return write


def sgd(**changes):
    return {"optimizers": [{**SGD, **changes}]}


def training(**changes):
    return {"optimizers": [SGD], "training": changes}


BAD = {
    "not YAML": ("optimizers: [1, {", "parsing config"),
    "not a mapping": ("- 1\n- 2\n", "config"),
    "empty": ("", "config"),
    "unknown key": ({"optimizers": [SGD], "epochs": 3}, "epochs"),
    "unknown nested key": (training(epoch=3), "epoch"),
    "wrong type": (training(epochs="four"), "training.epochs"),
    "fraction of an epoch": (training(epochs=1.5), "training.epochs"),
    "negative epochs": (training(epochs=-1), "training.epochs"),
    "target over 1": (training(target_accuracy=97), "training.target_accuracy"),
    "too many threads": (training(threads=10**6), "training.threads"),
    "no seed": (training(seeds=[]), "training.seeds"),
    "a seed twice": (training(seeds=[1, 1]), "training.seeds"),
    "batch too large": (training(batch_size=5000), "training.batch_size"),
    "groups": ({"optimizers": [SGD], "network": {"groups": 3}}, "network.groups"),
    "no test image": ({"optimizers": [SGD], "data": {"test_fraction": 1e-4}}, "data.test_fraction"),
    "name no file can have": ({"optimizers": [SGD], "name": "a/b"}, "name"),
    "no optimizer": ({"optimizers": []}, "optimizers"),
    "a name twice": ({"optimizers": [SGD, SGD]}, "optimizers"),
    "unknown optimizer key": (sgd(momentum=0.9), "momentum"),
    "unknown class": (sgd(**{"class": "torch.optim.Sgd"}), "torch.optim.Sgd"),
    "not an optimizer": (sgd(**{"class": "torch.optim.lr_scheduler"}), "lr_scheduler"),
    "other package": (sgd(**{"class": "os.system"}), "os.system"),
    "needs a closure": (sgd(**{"class": "torch.optim.LBFGS", "args": {}}), "closure"),
    "unknown argument": (sgd(args={"lr": 0.1, "momentums": 0.9}), "momentums"),
    "negative lr": (sgd(args={"lr": -0.1}), "lr"),
    "lr of the wrong type": (sgd(args={"lr": "fast"}), "lr"),
    "negative momentum": (sgd(args={"lr": 0.1, "momentum": -1.0}), "momentum"),
    "unknown SINGD argument": ({"optimizers": [singd(dampening=1.0)]}, "dampening"),
    "negative damping": ({"optimizers": [singd(damping=-1.0)]}, "damping"),
    "unknown structure": ({"optimizers": [singd(structure="round")]}, "round"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_configuration_is_one_line(case, arguments, tmp_path, capsys):
    config, named = BAD[case]
    assert main(arguments(config)) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("compare.py: error: ")
    assert output.err.count("\n") == 1
    assert named in output.err
    assert not (tmp_path / "runs").exists()


def test_bad_command_line_is_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    optimizers = f"--optimizers={json.dumps([SGD])}"
    for bad, named in [
        (["--config", str(tmp_path / "absent.yaml")], "absent.yaml"),
        ([], "optimizers"),
        ([optimizers, "--speed=9"], "--speed"),
        ([optimizers, f"--output={tmp_path / 'file'}"], "file"),
    ]:
        assert main(bad) == 2
        error = capsys.readouterr().err
        assert error.startswith("compare.py: error: ") and error.count("\n") == 1
        assert named in error


def test_exit_code_without_traceback(arguments):
    done = subprocess.run(
        COMPARE + arguments(training(epochs=-1)), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("compare.py: error: ") and done.stderr.count("\n") == 1


def test_interrupt_ends_cleanly(arguments, tmp_path):
    config = {
        "optimizers": [SGD],
        "network": {"width": 4},
        "training": {"epochs": 1, "seeds": list(range(1000))},
    }
    with subprocess.Popen(
        COMPARE + arguments(config),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("seed 0")
        for _ in range(10):  # one that arrives in a destructor is lost
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
                break
        _, error = process.communicate(timeout=300)
    assert process.returncode == 130
    assert error == "compare.py: interrupted\n"
    assert not list((tmp_path / "runs").iterdir())


def test_end_to_end(arguments, tmp_path, capsys):
    config = {
        "name": "tiny",
        "optimizers": [SGD, singd(structure="diagonal", kfac_approx="reduce")],
        "network": {"width": 8},
        "training": {
            "epochs": 2,
            "batch_size": 64,
            "eval_every": 10,
            "warmup_steps": 2,
            "target_accuracy": 0.5,
            "seeds": [0, 1],
            "threads": 1,
        },
    }
    assert main(arguments(config)) == 0
    assert "SINGD" in capsys.readouterr().out

    (folder,) = (tmp_path / "runs").glob("tiny-*")
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((folder / "results.json").read_text())
    assert results["config"]["training"]["epochs"] == 2
    assert results["config"]["optimizers"] == config["optimizers"]
    assert torch.__version__.startswith(results["versions"]["torch"])
    assert results["machine"]["threads"] == 1
    check_runs(results["runs"])

    rows = results["rows"]
    assert [row["optimizer"] for row in rows] == ["SGD", "SINGD"]
    assert rows[0]["relative_step_time"] == 1.0
    for row in rows:
        runs = [run for run in results["runs"] if run["optimizer"] == row["optimizer"]]
        best = [max(run["accuracy"]) for run in runs]
        assert row["accuracy_mean"] == pytest.approx(sum(best) / 2)
        assert row["accuracy_mean"] > 0.5  # it learns: chance is 0.1
        assert row["seconds_to_target"] > 0


def test_a_diverged_run_is_said_to_be_one(arguments, tmp_path, capsys):
    wild = {"name": "wild", "class": "torch.optim.SGD", "args": {"lr": 1e30}}
    training = {"epochs": 1, "seeds": [0]}
    config = {"optimizers": [SGD, wild], "network": {"width": 4}, "training": training}
    assert main(arguments(config)) == 0
    assert "Diverged before the end: wild at 1 of 1 seed." in capsys.readouterr().out

    (path,) = (tmp_path / "runs").glob("*/results.json")
    results = json.loads(path.read_text(), parse_constant=pytest.fail)  # no NaN in JSON
    assert [row["diverged"] for row in results["rows"]] == [0, 1]
    assert results["runs"][1]["train_loss"][-1] is None


def check_runs(runs):
    """Two optimizers at two seeds, of 42 steps (2 epochs, 1347 images in batches of 64)."""
    assert [(run["optimizer"], run["seed"]) for run in runs] == [
        ("SGD", 0),
        ("SINGD", 0),
        ("SGD", 1),
        ("SINGD", 1),
    ]
    for run in runs:
        assert run["steps"] == [10, 20, 30, 40, 42]
        assert len(run["step_seconds"]) == 42
        assert run["seconds"] == sorted(run["seconds"])
        assert run["seconds"][-1] == pytest.approx(sum(run["step_seconds"]))
        assert len(run["accuracy"]) == len(run["train_loss"]) == 5
    first = [run["train_loss"][0] for run in runs]
    assert first[0] != first[2]  # seeds differ


def test_summary_counts_seeds_that_never_arrive():
    comparison = Comparison(optimizers=[SGD], training=Training(timing_warmup=1))
    run = {"optimizer": "SGD", "steps": [1, 2], "train_loss": [1.0, 0.5], "seconds": [1.0, 2.0]}
    runs = [
        Run(seed=0, step_seconds=[9.0, 1.0], accuracy=[0.5, 0.98], **run),
        Run(seed=1, step_seconds=[9.0, 1.0], accuracy=[0.98, 0.9], **run),
        Run(seed=2, step_seconds=[9.0, 1.0], accuracy=[0.5, 0.6], **run),
    ]
    (row,) = summarize(comparison, runs)
    assert row.steps_to_target == 2 and row.seconds_to_target == 2.0  # of 2, 1 and never
    assert row.step_milliseconds == 1e3
    runs[0].accuracy[1] = 0.6
    (row,) = summarize(comparison, runs)
    assert row.steps_to_target is None and row.seconds_to_target is None
    assert row.accuracy_mean == pytest.approx((0.6 + 0.98 + 0.6) / 3)
