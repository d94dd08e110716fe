"""The page and the plot of a run's JSON."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.table import header, line, mebibytes, number

Row = dict[str, Any]
MODES = {
    "fp32": "float32, TF32 in convolutions only (torch's default)",
    "amp": "bfloat16 by autocast, channels_last",
    "compiled": "as amp, the model by torch.compile",
    "reduce-overhead": "as compiled, by torch.compile's mode of that name: with CUDA graphs",
    "graph": "as amp, the whole step captured in one CUDA graph and replayed",
}
LEGEND = (
    "First tables: time / peak memory of steady-state steps, of the faster SGD's (momentum 0.9), "
    "measured in the same process before and after the others. An optimizer named a/b has new "
    "factors every a steps and new inverses every b; its time is the mean over whole periods, as "
    "that with T=10; that of others is a median."
)
HOST_LEGEND = (
    "Second tables: the host's time to issue a step into an empty queue, of SGD's / kernels "
    "launched / time for which the GPU is busy, of SGD's / optimizer state in MiB. –: not profiled."
)


def ratio(row: Row, key: str = "seconds") -> float | None:
    """A number of a row over SGD's, or None if either is unknown."""
    profile, sgd = row.get("profile") or {}, row.get("sgd") or {}
    own, base = row.get(key, profile.get(key)), sgd.get(key)
    return own / base if own and base else None


def page(document: dict[str, Any], plot: str | None = None) -> str:
    """All tables, and under which circumstances they hold."""
    rows = document["rows"]
    lines = ["# Whole training steps against SGD", "", *circumstances(document)]
    if plot:
        lines += ["", f"![time of SGD's]({plot})"]
    for mode in _distinct(rows, "mode"):
        found = [row for row in rows if row["mode"] == mode]
        lines += ["", f"## {mode}", "", f"{MODES.get(mode, mode)}.", ""]
        lines += [*table(found, baseline_cell, time_cell), "", *drift(found)]
        lines += [
            "Host's time to issue / kernels / GPU's busy time / MiB of state:",
            "",
        ]
        lines += table(found, baseline_host_cell, host_cell)
        lines += problems(found)
    return "\n".join(lines) + "\n"


def circumstances(document: dict[str, Any]) -> Iterator[str]:
    """Machine, versions and settings, in words."""
    machine, settings, rows = document["machine"], document["settings"], document["rows"]
    where = machine.get("gpu") or f"{machine['processor']}, {machine['threads']} thread(s)"
    known = (f"{name} {version}" for name, version in document["versions"].items() if version)
    yield f"- {where}; {', '.join(known)}"
    yield (
        f"- {settings['steps']} steps after at least {settings['warmup']}; over whole periods, at "
        f"least {settings['average']}; random images and labels, cudnn.benchmark on."
    )
    sizes = {row["model"]: f"{row['model']} {row['batch']} × {row['pixels']}²" for row in rows}
    yield f"- Images: {', '.join(sizes.values())}."
    commits = sorted({str(row["commit"]) for row in rows})
    if len(commits) > 1:
        yield f"- Rows were measured at different commits: {', '.join(commits)}."
    yield f"- {LEGEND}"
    yield f"- {HOST_LEGEND}"


def table(rows: Sequence[Row], first: Any, others: Any) -> list[str]:
    """A line for SGD in absolute numbers, and one for every optimizer; a column for each model."""
    models = _distinct(rows, "model")
    by = {(row["optimizer"], row["model"]): row for row in rows}
    sgd = {row["model"]: row["sgd"] for row in rows if row.get("sgd")}
    lines = [*header("optimizer", *models)]
    lines.append(line("**SGD**", *(first(sgd[m]) if m in sgd else "" for m in models)))
    for name in _distinct(rows, "optimizer"):
        found = (by.get((name, model)) for model in models)
        lines.append(line(name, *(others(row) if row else "" for row in found)))
    return lines


def baseline_cell(sgd: Row) -> str:
    """SGD's time and memory."""
    peak = f" / {sgd['bytes'] / 2**30:.2f} GiB" if sgd["bytes"] else ""
    return f"{1e3 * sgd['seconds']:.4g} ms{peak}"


def time_cell(row: Row) -> str:
    """Time and memory, of SGD's."""
    if row["status"] != "ok":
        return _short(row)
    memory = ratio(row, "bytes")
    seconds = ratio(row)
    if seconds is None:
        return f"{1e3 * row['seconds']:.4g} ms"
    return f"{seconds:.2f}x" + (f" / {memory:.2f}x" if memory else "")


def baseline_host_cell(sgd: Row) -> str:
    """What `host_cell` has of SGD, in absolute numbers."""
    busy, launches = sgd.get("busy_seconds"), sgd.get("launches")
    cells = [
        f"{1e3 * sgd['issue_seconds']:.3g} ms",
        "–" if launches is None else f"{launches:.0f}",
        "–" if busy is None else f"{1e3 * busy:.4g} ms",
    ]
    return " / ".join((*cells, mebibytes(sgd["state_bytes"])))


def host_cell(row: Row) -> str:
    """The host's time, launches, the GPU's busy time, state."""
    if row["status"] != "ok":
        return _short(row)
    launches = (row.get("profile") or {}).get("launches")
    issue, busy = (ratio(row, key) for key in ("issue_seconds", "busy_seconds"))
    cells = (_times(issue), "–" if launches is None else f"{launches:.0f}", _times(busy))
    return " / ".join((*cells, mebibytes(row["state_bytes"])))


def drift(rows: Iterable[Row]) -> list[str]:
    """How far SGD's time moved meanwhile."""
    found = {}
    for row in rows:
        sgd = row.get("sgd") or {}
        if sgd.get("drift") is not None:
            found[row["model"]] = f"{row['model']} {sgd['drift']:+.1%} ({sgd['kind']})"
    return [f"SGD after the others, over SGD before: {', '.join(found.values())}.", ""][
        : 2 * bool(found)
    ]


def problems(rows: Iterable[Row]) -> list[str]:
    """What failed, in full."""
    failed = [row for row in rows if row["status"].startswith("failed")]
    return ["", *(f"- {row['model']}, {row['optimizer']}: {row['status']}" for row in failed)][
        : None if failed else 0
    ]


def _short(row: Row) -> str:
    return ":".join(row["status"].split(":")[:2])


def _times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}x"


def _distinct(rows: Iterable[Row], key: str) -> list[str]:
    return list(dict.fromkeys(row[key] for row in rows))


def draw(document: dict[str, Any], path: Path) -> None:
    """Bars of every optimizer's time over SGD's, a panel for each mode."""
    from matplotlib import colormaps  # only plots need it
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    rows = [row for row in document["rows"] if ratio(row)]
    modes, names = _distinct(rows, "mode"), _distinct(rows, "optimizer")
    if not rows:
        return
    figure = Figure(figsize=(12, 1.2 + 3.2 * len(modes)), layout="compressed")
    panels = figure.subplots(len(modes), 1, squeeze=False)[:, 0]
    models, width = _distinct(rows, "model"), 0.8 / len(names)
    for axes, mode in zip(panels, modes, strict=True):
        for i, name in enumerate(names):
            found = {r["model"]: r for r in rows if (r["mode"], r["optimizer"]) == (mode, name)}
            bars = [(models.index(m) - 0.4 + (i + 0.5) * width, ratio(r) or 1.0)
                    for m, r in found.items()]  # fmt: skip
            axes.bar([x for x, _ in bars], [y - 1 for _, y in bars], width, bottom=1.0,
                     color=colormaps["tab20"](i % 20), label=name)  # fmt: skip
        axes.set(yscale="log", ylabel="time, of SGD's", title=mode)
        axes.set_xticks(range(len(models)), models)
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.2, 1.5, 2.0, 3.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.axhline(1.0, color="0.35", lw=1)
        axes.grid(axis="y", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5,
                  frameon=False)  # fmt: skip
    figure.savefig(path, dpi=120)
