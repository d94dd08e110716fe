"""One picture for each operation: our time on every layer against the others'."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.results import Case, Results, geometric_mean, ratios

# Okabe and Ito's colours, which colour-blind people can tell apart.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
LABELS = {
    "resnet18": "ResNet18",
    "vgg19": "VGG19",
    "convnext_base": "ConvNeXt-base",
    "mobilenet_v2": "MobileNetV2",
    "inception_v3": "InceptionV3",
    "resnext101": "ResNeXt101",
    "peers": "named layers",
}
FACTORS = (10.0, 100.0)


def draw(results: Results, stem: Path) -> Iterator[Path]:
    """Draw every operation; yields the files STEM-OPERATION.png."""
    for operation in results.operations:
        cases = results.of(operation)
        others = [name for name in results.implementations(operation) if name != "ours"]
        others = [name for name in others if ratios(cases, name)]
        if not others:
            continue
        figure = _figure(results, operation, cases, others)
        path = stem.with_name(f"{stem.name}-{operation}.png")
        figure.savefig(path, dpi=120)
        yield path


def _figure(
    results: Results, operation: str, cases: Sequence[Case], others: Sequence[str]
) -> Figure:
    """A panel for each baseline, on the same scales."""
    figure = Figure(
        figsize=(1.1 + 4.2 * len(others), 6.8 if len(others) == 1 else 6.1), layout="compressed"
    )
    panels = figure.subplots(1, len(others), sharex=True, sharey=True, squeeze=False)[0]
    span = _span(cases, others)
    for axes, other in zip(panels, others, strict=True):
        _panel(axes, results.networks, cases, other, span)
    panels[0].set_ylabel("ours, time per layer in ms")
    settings, machine = results.document["settings"], results.document["machine"]
    where = machine.get("gpu") or "CPU"
    tf32 = ", TF32" if settings["tf32"] else ""
    figure.suptitle(f"{operation}: {where}, {settings['dtype']}{tf32}", fontsize=13)
    entries = dict(zip(*panels[0].get_legend_handles_labels()[::-1], strict=True))
    columns = min(3 if len(others) == 1 else 6, len(entries))
    figure.legend(
        entries.values(),
        entries.keys(),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        handletextpad=0.1,
        columnspacing=1.2,
    )
    return figure


def _span(cases: Sequence[Case], others: Sequence[str]) -> tuple[float, float]:
    """What both axes show, in ms: all times with a margin."""
    times = [case.value(name) for case in cases for name in ("ours", *others)]
    shown = [1e3 * value for value in times if value]
    return min(shown) / 1.6, max(shown) * 1.6


def _panel(
    axes: Axes, networks: Sequence[str], cases: Sequence[Case], other: str,
    span: tuple[float, float],
) -> None:  # fmt: skip
    _guides(axes, span)
    for index, network in enumerate(networks):
        pairs = [
            (1e3 * theirs, 1e3 * ours)
            for case in cases
            if case.network == network and (ours := case.value("ours"))
            and (theirs := case.value(other))
        ]  # fmt: skip
        axes.scatter(
            *zip(*pairs, strict=True) if pairs else ([], []),
            s=34, color=COLORS[index % len(COLORS)], alpha=0.85, edgecolors="white",
            linewidths=0.6, label=LABELS.get(network, network), zorder=3,
        )  # fmt: skip
    found = ratios(cases, other)
    mean, slower = geometric_mean(ratio for ratio, _ in found), sum(r > 1 for r, _ in found)
    axes.set_title(
        f"ours / {other}: {mean:.2g} (geometric mean)\n"
        f"ours slower on {slower} of {len(found)} layers",
        fontsize=10,
    )
    axes.set_xlabel(f"{other}, time per layer in ms")


def _guides(axes: Axes, span: tuple[float, float]) -> None:
    """Equal times, ours 10 and 100 times faster, and the half where ours is slower in grey."""
    low, high = span
    axes.set(xscale="log", yscale="log", xlim=span, ylim=span, box_aspect=1)
    axes.fill_between(span, span, (high, high), color="0.94", lw=0, zorder=0)
    axes.plot(span, span, color="0.35", lw=1.2, zorder=1)
    axes.annotate(
        "ours slower", (0.03, 0.97), xycoords="axes fraction", va="top", color="0.45", fontsize=9
    )
    axes.annotate(
        "ours faster", (0.97, 0.03), xycoords="axes fraction", ha="right", color="0.45", fontsize=9,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
    )  # fmt: skip
    for factor in FACTORS:
        if high / factor > 2 * low:
            axes.plot(span, (low / factor, high / factor), color="0.7", lw=0.8, ls=":", zorder=1)
            axes.annotate(
                f"{factor:.0f}×", (high / 1.08, high / factor), ha="right", va="bottom",
                color="0.5", fontsize=8,
            )  # fmt: skip
    subs = (1.0, 2.0, 5.0) if high < 300 * low else (1.0,)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=subs))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.2, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
