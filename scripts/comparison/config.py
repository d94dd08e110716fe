"""What a comparison is, as typed dataclasses that check their ranges.

jsonargparse fills them from YAML files and the command line; what it cannot
see from the types alone, `__post_init__` checks and reports as a ValueError
that names the key.
"""

# No `from __future__ import annotations`: jsonargparse would then resolve the
# annotations as a type checker does, and not see the restricted types.
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from jsonargparse import ArgumentError, ArgumentParser
from jsonargparse.typing import restricted_number_type, restricted_string_type

if TYPE_CHECKING:
    NonNegativeInt = int
    PositiveInt = int
    Seed = int
    Threads = int
    OpenUnitInterval = float
    RunName = str
else:
    from jsonargparse.typing import NonNegativeInt, OpenUnitInterval, PositiveInt

    Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**32)])
    Threads = restricted_number_type("Threads", int, [(">", 0), ("<=", 256)])
    RunName = restricted_string_type("RunName", r"^\w[\w.-]*$", docstring="Fit for a file name.")

# Not in class syntax, since `class` is a keyword.
OptimizerEntry = TypedDict("OptimizerEntry", {"name": str, "class": str, "args": dict[str, Any]})


@dataclass(frozen=True)
class Data:
    """How the 1797 images are split, always stratified by digit.

    Args:
        test_fraction: share of all images held out as the test set.
        validation_fraction: share of the other images held out as the validation set,
            used only with `evaluate_on: validation`.
        split_seed: seed of both splits.
        evaluate_on: `test` trains on everything but the test set; `validation`,
            for choosing hyper-parameters, does not touch the test set at all.
    """

    test_fraction: OpenUnitInterval = 0.25
    validation_fraction: OpenUnitInterval = 0.25
    split_seed: Seed = 0
    evaluate_on: Literal["test", "validation"] = "test"


@dataclass(frozen=True)
class Network:
    """The size of the network.

    Args:
        width: channels after the first convolution; the later ones have 2 and 4 times as many.
        groups: groups of the second convolution, a divisor of `width`.
    """

    width: PositiveInt = 16
    groups: PositiveInt = 4

    def __post_init__(self) -> None:
        if self.width % self.groups:
            raise ValueError(
                f"network.groups: {self.groups} does not divide network.width {self.width}"
            )


@dataclass(frozen=True)
class Training:
    """The training loop, the same for every optimizer.

    Args:
        epochs: passes over the training set.
        batch_size: images a step; a last, smaller batch is dropped.
        warmup_steps: steps in which the learning rate rises linearly to its peak,
            from which it then falls to 0 along a cosine.
        eval_every: steps between two evaluations.
        target_accuracy: the accuracy whose first reaching is reported.
        timing_warmup: first steps of a run that the median step time leaves out.
        threads: CPU threads of torch. One is nearly as fast as several for so small a
            network, and far steadier where other programs want the cores too.
        seeds: one run of each optimizer a seed.
    """

    epochs: PositiveInt = 20
    batch_size: PositiveInt = 64
    warmup_steps: NonNegativeInt = 20
    eval_every: PositiveInt = 5
    target_accuracy: OpenUnitInterval = 0.97
    timing_warmup: NonNegativeInt = 10
    threads: Threads = 1
    seeds: list[Seed] = field(default_factory=lambda: [0, 1, 2])

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"training.seeds: must be distinct and not empty, got {self.seeds}")


@dataclass(frozen=True)
class Comparison:
    """Several optimizers on one task.

    Args:
        optimizers: entries with a `name` for the table, the dotted path of a `class`
            (torch.optim.NAME or tn_kfac.NAME) and its keyword `args`. The first one
            is what step times are relative to.
        name: names the run folder.
        output: folder that the run folder is made in; taken from the repository's
            root if relative.
        data: the split of the images.
        network: the size of the network.
        training: the training loop.
    """

    optimizers: list[OptimizerEntry]
    name: RunName = "digits"
    output: str = "runs"
    data: Data = field(default_factory=Data)
    network: Network = field(default_factory=Network)
    training: Training = field(default_factory=Training)

    def __post_init__(self) -> None:
        names = [entry["name"] for entry in self.optimizers]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"optimizers: names must be distinct and not none, got {names}")
        for entry in self.optimizers:
            lr = entry["args"].get("lr", 1.0)
            if not (isinstance(lr, int | float) and 0 < lr < math.inf):
                raise ValueError(
                    f"optimizers: {entry['name']!r}: lr must be a positive number, got {lr!r}"
                )


def parse(arguments: Sequence[str] | None = None) -> Comparison:
    """Read the configuration from the command line and the YAML files it names.

    Args:
        arguments: the command line, `sys.argv[1:]` if None. A later `--config` or
            option overrides the keys that it sets.

    Raises:
        ValueError: with a message of one line, for anything that is wrong.
    """
    parser = ArgumentParser(
        prog="compare.py", exit_on_error=False, description="Compare optimizers."
    )
    parser.add_argument("--config", action="config", help="a YAML file; may be repeated")
    parser.add_class_arguments(Comparison)
    try:
        parsed = parser.instantiate(parser.parse_args(arguments))
    except ArgumentError as error:
        raise ValueError(" ".join(str(error).split())) from None
    del parsed["config"]
    return Comparison(**parsed.as_dict())
