"""What to try next, by Optuna's tree-structured Parzen estimator.

A study is rebuilt from the trials on file for each suggestion, so that a tuning that was cut short
goes on as it would have. Optuna's storage is in memory: of its dependencies only colorlog, numpy,
packaging, tqdm and PyYAML are needed, neither alembic nor sqlalchemy.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.time_to_target.spaces import HORIZON, Params, Space

STARTUP = 6
"""First trials, which are random: the same points, relative to the ranges, for all optimizers."""


def suggest(
    space: Space, told: Sequence[tuple[Params, float]], number: int, horizon: float | None
) -> dict[str, float]:
    """Parameters of trial `number`, given those of others with their scores (the less the better).

    Args:
        space: What is searched, beside the horizon.
        told: Earlier trials.
        number: Of the trial; it seeds what is random.
        horizon: None if it is searched too.

    Raises:
        ModuleNotFoundError: If Optuna is absent.
    """
    try:
        import optuna  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}: pip install optuna", name=error.name) from None

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    uniform = optuna.distributions.FloatDistribution
    ranges = space.ranges()
    axes = {key: uniform(low, high, log=True) for key, (low, high) in ranges.items()}
    if horizon is None:
        axes["horizon"] = uniform(*HORIZON)
    sampler = optuna.samplers.TPESampler(seed=number, n_startup_trials=STARTUP)
    study = optuna.create_study(sampler=sampler)
    for params, value in told:
        known = {key: params[key] for key in axes}
        study.add_trial(
            optuna.trial.create_trial(params=known, distributions=axes, value=value)  # pyright: ignore
        )
    found = study.ask(axes).params  # pyright: ignore[reportArgumentType]
    short = {key: float(f"{value:.4g}") for key, value in found.items()}
    bounds = ranges | {"horizon": HORIZON}
    inside = {key: min(max(value, bounds[key][0]), bounds[key][1]) for key, value in short.items()}
    return inside if horizon is None else inside | {"horizon": horizon}
