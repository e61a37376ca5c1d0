"""What `hf-linattn bench` shows and keeps: tables, one line of JSON, log-log plots, the results file of a device.

The results file has the keys device, torch, runs, and of rows (the timing suites), decode and errors those that were
measured. Every row names its run, a key of runs: {date: suite, commit, command, copy_gbs, peers}. Measuring the same
again on the same device replaces the row.
"""

import json
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hf_linattn.errors import UserError
from hf_linattn.evals.results_file import write_results

PEERS = ("triton", "fla-core", "flash-linear-attention", "mlstm-kernels")
SECTIONS = ("rows", "decode", "errors")
RUN_FACTS = ("suite", "commit", "command", "copy_gbs", "peers")
# What tells a measurement from the others of its section.
ROW_KEY = ("suite", "form", "impl", "B", "H", "N", "D", "dtype")
NUMBERS_WIDTH = 190
MEASURES = (("fwd_ms", "forward, ms"), ("fwd_bwd_ms", "forward + backward, ms"), ("extra_mib", "extra memory, MiB"))


def peer_versions() -> dict[str, str]:
    """Versions of what the ops are compared with, where installed."""
    found = {}
    for name in PEERS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def print_bench(results: dict, console: Console) -> None:
    """A table per section, then one line of JSON; in a file or a pipe as wide as the tables need."""
    if not console.is_terminal:
        console.width = max(console.width, NUMBERS_WIDTH)
    for section, table in (("rows", timing_table), ("decode", decode_table), ("errors", error_table)):
        if results.get(section):
            console.print(table(results[section]))
    console.print(json.dumps(results), soft_wrap=True, highlight=False, markup=False)


def timing_table(rows: list[dict]) -> Table:
    """Times with what a tenth of the runs stayed below and above, as multiples of the floor, and rates."""
    table = _table(
        "Attention ops (median ms, 10th to 90th percentile; x: multiple of the byte floor)",
        ("impl",),
        (
            "B, H, N, D",
            "dtype",
            "forward",
            "x",
            "forward + backward",
            "x",
            "in a graph",
            "GB/s",
            "% of copy",
            "TFLOP/s",
            "extra MiB",
        ),
    )

    def both(row: dict, name: str, digits: int, factor: float = 1.0) -> str:
        values = (row[name.format(kind)] for kind in ("fwd", "fwd_bwd"))
        return " / ".join(_number(x, digits, factor) for x in values)

    for row in rows:
        cells = []
        for kind in ("fwd", "fwd_bwd"):
            ms = row[f"{kind}_ms"]
            low, high = (_number(row[f"{kind}_{p}_ms"], 3) for p in ("p10", "p90"))
            cells.append("-" if ms is None else f"{ms:.3f} ({low} to {high})")
            cells.append("-" if ms is None else f"{ms / row[f'floor_{kind}_ms']:.1f}")
        extra = " / ".join(_number(row[name], 1) for name in ("extra_fwd_mib", "extra_mib"))
        shape = ", ".join(str(row[name]) for name in "BHND")
        rates = both(row, "{}_gbs", 0), both(row, "{}_copy_share", 0, 100), both(row, "{}_tflops", 1)
        graph = _number(row["fwd_bwd_graph_ms"], 3)
        table.add_row(row["impl"], shape, row["dtype"], *cells, graph, *rates, extra)
    return table


def decode_table(rows: list[dict]) -> Table:
    """One step: called, and replayed from a CUDA graph."""
    table = _table(
        "Decode step (median us; multiple of reading and writing the state once)",
        ("impl",),
        ("B, H, D", "dtype", "called", "x", "in a CUDA graph", "x", "floor us"),
    )
    for row in rows:
        cells = []
        for name in ("us", "graph_us"):
            cells += [_number(row[name], 1), _number(row[name], 2, 1 / row["floor_us"])]
        shape = ", ".join(str(row[name]) for name in "BHD")
        table.add_row(row["impl"], shape, row["dtype"], *cells, _number(row["floor_us"], 1))
    return table


def error_table(rows: list[dict]) -> Table:
    """Relative RMSE to float64."""
    names = ("o", "dq", "dk", "dv")
    table = _table("Relative RMSE to float64", ("form", "impl"), ("B, H, N, D", "dtype", *names))
    for row in rows:
        shape = ", ".join(str(row[name]) for name in "BHND")
        cells = ("-" if row[name] is None else f"{row[name]:.1e}" for name in names)
        table.add_row(row["form"], row["impl"], shape, row["dtype"], *cells)
    return table


def plot_bench(rows: list[dict], path: Path) -> bool:
    """Log-log plots of times and extra memory against N and against D, a column for every series of shapes.

    Args:
        rows: from a timing suite.
        path: file to write; the suffix selects the format.

    Returns:
        Whether there was a series of at least two points to plot.
    """
    from matplotlib.figure import Figure

    series = _series(rows)
    if not series:
        return False
    figure = Figure(figsize=(5 * len(series), 10), layout="constrained")
    axes = figure.subplots(len(MEASURES), len(series), squeeze=False)
    for column, (axis, title, chosen) in enumerate(series):
        for ax, (measure, label) in zip(axes[:, column], MEASURES, strict=True):
            for impl in dict.fromkeys(row["impl"] for row in chosen):
                points = sorted((row[axis], row[measure]) for row in chosen if row["impl"] == impl and row[measure])
                if points:
                    ax.plot(*zip(*points, strict=True), marker="o", markersize=3, label=impl)
            if measure != "extra_mib":
                for has_window, style, name in ((False, "--", "byte floor"), (True, ":", "byte floor, window")):
                    of_kind = [row for row in chosen if (row["op"] == "window_linear_attention") == has_window]
                    floor = sorted({(row[axis], row[f"floor_{measure}"]) for row in of_kind})
                    if floor:
                        ax.plot(*zip(*floor, strict=True), linestyle=style, color="black", label=name)
            ax.set(xscale="log", yscale="log", xlabel=axis, ylabel=label, title=title)
            ax.grid(True, which="both", alpha=0.3)
        axes[0, column].legend(fontsize="small")
    figure.savefig(path)
    return True


def write_bench(path: Path, facts: dict, sections: dict[str, list[dict]]) -> None:
    """Merge rows of one run into the results file.

    Args:
        path: the JSON file, made if it does not exist.
        facts: device, torch, and of the run date and `RUN_FACTS`.
        sections: {section: rows}, from `bench.run_suite`.

    Raises:
        UserError: the file holds results of another device or version of PyTorch.
    """
    kept = _read(path, facts)
    merged = {name: facts[name] for name in ("device", "torch")}
    merged["runs"] = kept.get("runs", {}) | {facts["date"]: {name: facts[name] for name in RUN_FACTS}}
    for section in SECTIONS:
        rows = {_row_key(row): row for row in kept.get(section, [])}
        rows |= {_row_key(row): row | {"run": facts["date"]} for row in sections.get(section, [])}
        if rows:
            merged[section] = list(rows.values())
    used = {row["run"] for section in SECTIONS for row in merged.get(section, [])}
    merged["runs"] = {date: run for date, run in merged["runs"].items() if date in used}
    write_results(path, merged)


def _row_key(row: dict) -> tuple:
    return tuple(row.get(name) for name in ROW_KEY)


def plot_results(path: Path) -> list[Path]:
    """Plot every timing suite of a results file beside it; returns the plots written."""
    rows = json.loads(path.read_text(encoding="utf-8")).get("rows", [])
    written = []
    for suite in dict.fromkeys(row["suite"] for row in rows):
        plot = path.with_name(f"{path.stem}-{suite}.png")
        if plot_bench([row for row in rows if row["suite"] == suite], plot):
            written.append(plot)
    return written


def _read(path: Path, facts: dict) -> dict:
    if not path.exists():
        return {}
    kept = json.loads(path.read_text(encoding="utf-8"))
    for name in ("device", "torch"):
        if kept.get(name) != facts[name]:
            raise UserError(
                f"--output: {path} holds results with {name} {kept.get(name)}, these have {facts[name]}; "
                "name another file"
            )
    return kept


def _series(rows: list[dict]) -> list[tuple[str, str, list[dict]]]:
    """(axis, title, rows) of every set of shapes that differ in N alone (or in N at constant B N), or in D alone."""
    found = []
    for axis, fixed in (("N", "D"), ("D", "N")):
        groups: dict[tuple, list[dict]] = {}
        for row in rows:
            # Of the shapes of a sweep, B and N vary together.
            tokens = row["B"] * row["N"] if row["suite"] == "sweep" else row["B"]
            groups.setdefault((row["suite"], tokens, row["H"], row["dtype"], row[fixed]), []).append(row)
        for group in groups.values():
            if len({row[axis] for row in group}) > 1 and (axis == "N" or group[0]["suite"] != "sweep"):
                size = f"B N {group[0]['B'] * group[0]['N']}" if group[0]["suite"] == "sweep" else f"B {group[0]['B']}"
                title = f"{size}, H {group[0]['H']}, {fixed} {group[0][fixed]}, {group[0]['dtype']}"
                found.append((axis, title, group))
    return found


def _table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(title=title)
    for name in left:
        table.add_column(name)
    for name in right:
        table.add_column(name, justify="right")
    return table


def _number(x: float | None, digits: int, factor: float = 1.0) -> str:
    return "-" if x is None else f"{x * factor:.{digits}f}"
