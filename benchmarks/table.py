"""Turn the JSON of `benchmarks.layer` into Markdown tables and plots.

    python -m benchmarks.table benchmarks/results/layer-cpu.json

Writes layer-cpu.md and layer-cpu-OPERATION.png beside it. Needs no torch; plots need
matplotlib.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.results import ORDER, Case, Results, geometric_mean, load, ratios

BASELINES = ("unfold", "einconv", "torch", "limit")
SLOWER = 1.05
"""Ours is called slower from this ratio on; less is noise."""
MOST_SLOWER = 8


def markdown(results: Results) -> str:
    """The whole page."""
    sections = (
        ("Circumstances", circumstances),
        ("Ours over others, over all layers", summary),
        ("Ours over unfold, by network", by_network),
        ("Extra memory", memory),
        ("The host's time for a call", host),
        ("Largest relative error", errors),
        ("The named layers", named_layers),
        ("Where ours is slower", slower),
        ("Not measured", not_measured),
    )
    parts = [f"# One layer at a time, {results.document['settings']['device']}\n"]
    for title, section in sections:
        if lines := list(section(results)):
            parts.append("\n".join((f"## {title}\n", *lines, "")))
    return "\n".join(parts)


def circumstances(results: Results) -> Iterator[str]:
    """Machine, versions and settings, in words."""
    document = results.document
    machine, settings = document["machine"], document["settings"]
    where = machine.get("gpu") or f"{machine['processor']}, threads: {machine['threads']}"
    known = {name: version for name, version in document["versions"].items() if version}
    yield f"- {where}; " + ", ".join(f"{name} {version}" for name, version in known.items())
    yield (
        f"- {settings['dtype']}, {settings['memory_format']}, TF32 "
        f"{'on' if settings['tf32'] else 'off'}, copy bandwidth "
        f"{settings['bytes_per_second'] / 1e9:.4g} GB/s (read + written); images: "
        f"{_images(settings)}"
    )
    if settings["cold_l2"]:
        yield (
            "- GPU time by events, median; L2 emptied and the work queued before each sample; "
            "cudnn.benchmark on. The host's time for one call is given apart."
        )
    else:
        clock = "Wall time" if machine["threads"] > 1 else "Time for which the only thread ran"
        yield (
            f"- {clock}, median; implementations take turns. Extra memory: that of tensors, not "
            f"of operators' work space. Load average at the start: {machine['load_average']:.2g}."
        )
    yield (
        "- Ratios of times: below 1, ours is faster. limit: the bytes of operands and result over "
        "the copy bandwidth; operations bound by arithmetic cannot reach it. einconv: contraction "
        "only, its building of the expression comes on top."
    )
    yield f"- {document['note']} {document['seconds']:.0f} s."


def _images(settings: dict) -> str:
    given = ((name, settings[name]) for name in ("batch", "pixels"))
    return ", ".join(f"{name} {value}" for name, value in given if value) or "full size"


def summary(results: Results) -> Iterator[str]:
    """Geometric mean and worst case of our time over each baseline's."""
    yield from header("operation", "layers", *(f"ours / {name}" for name in BASELINES))
    worst = []
    for operation in results.operations:
        cases = results.of(operation)
        cells = []
        for baseline in BASELINES:
            found = ratios(cases, baseline)
            mean = geometric_mean(ratio for ratio, _ in found)
            cells.append(f"**{mean:.3g}** (worst {found[0][0]:.3g})" if found else "")
            if found and baseline != "limit":
                worst.append((operation, baseline, *found[0]))
        yield line(operation, len(cases), *cells)
    yield "\nGeometric mean (worst case). The worst cases:\n"
    for operation, baseline, ratio, case in worst:
        yield f"- {operation} / {baseline}: {ratio:.3g}, {case.name}"


def by_network(results: Results) -> Iterator[str]:
    """Geometric mean of our time over unfold's."""
    networks = list(dict.fromkeys(case.network for case in results.cases))
    yield from header("operation", *networks)
    for operation in results.operations:
        means = (
            geometric_mean(ratio for ratio, _ in ratios(results.of(operation, [name]), "unfold"))
            for name in networks
        )
        yield line(operation, *(number(mean) for mean in means))


def memory(results: Results) -> Iterator[str]:
    """The most extra memory of any layer."""
    yield from header("operation", *(f"most MiB {name}" for name in ORDER))
    for operation in results.operations:
        extra = [_values(results.of(operation), name, "extra_bytes") for name in ORDER]
        yield line(operation, *(mebibytes(found[-1]) if found else "" for found in extra))


def host(results: Results) -> Iterator[str]:
    """What the host needs for a call on a GPU, and who wins if calls follow each other."""
    if results.document["settings"]["device"] != "cuda":
        return
    yield "Median over layers; then the ratio of times, each the GPU's or the host's if longer.\n"
    yield from header("operation", *(f"{name}, µs" for name in ORDER), "ours / unfold")
    for operation in results.operations:
        cases = results.of(operation)
        found = [_values(cases, name, "host_seconds") for name in ORDER]
        pairs = ((case.busy("ours"), case.busy("unfold")) for case in cases)
        mean = geometric_mean(ours / theirs for ours, theirs in pairs if ours and theirs)
        medians = (number(1e6 * times[len(times) // 2]) if times else "" for times in found)
        yield line(operation, *medians, number(mean))


def _values(cases: Sequence[Case], implementation: str, key: str) -> list[float]:
    """In ascending order, of the cases that have the number."""
    values = (case.value(implementation, key) for case in cases)
    return sorted(value for value in values if value is not None)


def errors(results: Results) -> Iterator[str]:
    """max |result − exact| / max |exact| over all layers, exact by unfold in float64."""
    yield from header("operation", *ORDER)
    for operation in results.operations:
        found = [_values(results.of(operation), name, "max_relative_error") for name in ORDER]
        yield line(operation, *(f"{values[-1]:.1e}" if values else "" for values in found))


def named_layers(results: Results) -> Iterator[str]:
    """PEERS.md's layers in full."""
    on_gpu = results.document["settings"]["device"] == "cuda"
    shapes = {(e["network"], e["name"]): e["shape"] for e in results.document["layers"]}
    for operation in results.operations:
        if not (cases := results.of(operation, ["peers"])):
            continue
        names = results.implementations(operation)
        yield f"### {operation}\n"
        host = ["host µs " + " / ".join(names)] if on_gpu else []
        times = (f"{name}, ms" for name in names)
        each = " / ".join(names)
        yield from header(
            "layer",
            "input",
            "limit, ms",
            *times,
            *host,
            f"extra MiB {each}",
            f"error {each}",
            text=2,
        )
        for case in cases:
            host = [_each(case, names, "host_seconds", lambda v: number(1e6 * v))] * on_gpu
            limit = case.value("ours", "limit_seconds")
            yield line(
                case.layer,
                "×".join(map(str, shapes[case.network, case.layer])),
                number(1e3 * limit) if limit else "",
                *(_time(case, name) for name in names),
                *host,
                _each(case, names, "extra_bytes", mebibytes),
                _each(case, names, "max_relative_error", lambda v: f"{v:.0e}"),
            )
        yield ""


def _time(case: Case, implementation: str) -> str:
    row = case.rows.get(implementation, {"status": ""})
    if row["status"] != "ok":
        return row["status"]
    build = row.get("build_seconds")
    return number(1e3 * row["seconds"]) + (f" (+{1e3 * build:.2g} build)" if build else "")


def _each(case: Case, names: Sequence[str], key: str, show: Callable[[float], str]) -> str:
    values = (case.value(name, key) for name in names)
    return " / ".join("–" if value is None else show(value) for value in values)


def slower(results: Results) -> Iterator[str]:
    """Cases where another implementation beats ours, worst first."""
    found = []
    for case in results.cases:
        others = [(case.ratio(name) or 0.0, name) for name in ORDER[1:]]
        ratio, name = max(others)
        if ratio > SLOWER:
            found.append((ratio, name, case))
    if not found:
        return
    of = Counter(case.operation for case in results.cases)
    layers = {(e["network"], e["name"]): e for e in results.document["layers"]}
    yield f"By more than {SLOWER - 1:.0%}; of each operation the {MOST_SLOWER} worst layers.\n"
    yield from header("operation", "than", "layer", "input", "kernel", "factor", "ours, ms", text=5)
    for operation in results.operations:
        mine = [item for item in found if item[-1].operation == operation]
        for ratio, name, case in sorted(mine, key=lambda item: -item[0])[:MOST_SLOWER]:
            layer = layers[case.network, case.layer]
            ours = number(1e3 * case.rows["ours"]["seconds"])
            shape = "×".join(map(str, layer["shape"]))
            yield line(operation, name, case.name, shape, _kernel(layer), f"{ratio:.2f}", ours)
        if mine:
            yield line(operation, f"any: {len(mine)} of {of[operation]} layers", *[""] * 5)


def _kernel(layer: dict) -> str:
    kernel = f"{'×'.join(map(str, layer['kernel_size']))} stride {layer['stride'][0]}"
    return kernel + (f" groups {layer['groups']}" if layer["groups"] > 1 else "")


def not_measured(results: Results) -> Iterator[str]:
    """What was skipped, ran out of memory or failed."""
    reasons: Counter[tuple[str, ...]] = Counter()
    for row in results.document["rows"]:
        if row["status"] != "ok":
            reason = row["status"].partition(": would need")[0]
            reasons[row["operation"], row.get("implementation", "all"), reason] += 1
    if reasons:
        yield from header("operation", "implementation", "reason", "layers", text=3)
        for key, count in reasons.items():
            yield line(*key, count)


def header(*cells: str, text: int = 1) -> tuple[str, str]:
    """The first two lines of a table, the first `text` columns of which hold no numbers."""
    return line(*cells), line(*(["---"] * text), *(["---:"] * (len(cells) - text)))


def line(*cells: object) -> str:
    """One line of a table."""
    return f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |"


def number(value: float | None) -> str:
    """Three digits without an exponent."""
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 1e-3 else f"{value:.1g}"


def mebibytes(value: float) -> str:
    """Of a number of bytes, no finer than a KiB."""
    return number(value / 2**20 if value >= 1024 else 0.0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read one JSON file, write the page and the plots beside it."""
    parser = argparse.ArgumentParser(prog="table.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("json", type=Path)
    parser.add_argument("--no-plots", action="store_true")
    args = parser.parse_args(arguments)
    results = load(args.json)
    page = args.json.with_suffix(".md")
    page.write_text(markdown(results))
    print(f"Written to {page}", file=sys.stderr)
    if not args.no_plots:
        from benchmarks.plots import draw  # matplotlib may be missing

        for path in draw(results, args.json.with_suffix("")):
            print(f"Written to {path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
