"""From a results file to a Markdown table, a console table and one page of plots.

README and model card are filled from `results_table`; nothing in them is typed by hand.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from hf_linattn.evals.controls import VARIANTS
from hf_linattn.evals.results_file import read_results

LABELS = {"teacher": "teacher", "student": "student", "window_only": "window only"}
COLOURS = {"teacher": "0.35", "student": "tab:blue", "window_only": "tab:orange"}
ACCURACIES = ("acc_norm", "acc", "exact_match")
"""The first of these that a task has is its accuracy in tables and plots."""
PERPLEXITIES = ("perplexity", "word_perplexity")


class Row(NamedTuple):
    """One line of the table: `values` by variant; of a perplexity less is better."""

    label: str
    values: dict[str, float]
    is_perplexity: bool


def results_table(results: Mapping | str | Path) -> str:
    """The results as a Markdown table: teacher, student and window-only control side by side.

    Behind each figure stands its share of the teacher's, for a perplexity the factor over the teacher's.

    Args:
        results (`Mapping`, `str` or `Path`): what `evaluate` returned, or the JSON file it wrote.

    Returns:
        `str`: table and a last line that says where the figures come from.
    """
    results = _load(results)
    variants = _scored(results)
    lines = ["| | " + " | ".join(LABELS[variant] for variant in variants) + " |", "|---" * (len(variants) + 1) + "|"]
    for row in table_rows(results):
        lines.append(f"| {row.label} | " + " | ".join(_cell(row, variant) for variant in variants) + " |")
    return "\n".join([*lines, "", _provenance(results)]) + "\n"


def print_results(results: Mapping | str | Path, console: Console | None = None) -> None:
    """Prints the same table on the console.

    Args:
        results: as for `results_table`.
        console (`rich.console.Console`, *optional*): where to print, standard output by default.
    """
    results = _load(results)
    variants = _scored(results)
    table = Table(caption=_provenance(results), caption_justify="left")
    table.add_column("")
    for variant in variants:
        table.add_column(LABELS[variant], justify="right")
    for row in table_rows(results):
        table.add_row(row.label, *(_cell(row, variant) for variant in variants))
    (console or Console()).print(table)


def plot_results(results: Mapping | str | Path, path: str | Path) -> Path:
    """Draws task accuracies, perplexity by position and the recall curves on one page.

    Args:
        results: as for `results_table`.
        path (`str` or `Path`): image to write; its suffix chooses the format (.png, .svg, .pdf).

    Returns:
        `Path`: `path`.
    """
    results = _load(results)
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    tasks, perplexity, recall = figure.subplots(1, 3)
    _plot_tasks(tasks, results)
    _plot_perplexity(perplexity, results)
    _plot_recall(recall, results)
    figure.savefig(path, dpi=150)
    return Path(path)


def write_report(results: Mapping | str | Path, folder: str | Path, name: str = "evaluation") -> tuple[Path, Path]:
    """Writes `<name>.md`, the table, and `<name>.png`, the page of plots, into `folder`; returns both paths."""
    results = _load(results)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / f"{name}.md"
    table.write_text(results_table(results), encoding="utf-8")
    return table, plot_results(results, folder / f"{name}.png")


def table_rows(results: Mapping) -> list[Row]:
    """The lines of the table: task accuracies and their mean, task perplexities, perplexity by position, recall."""
    accuracies, perplexities = [], []
    for task in _keys(results[variant] for variant in VARIANTS):
        of_task = {variant: results[variant][task] for variant in VARIANTS if task in results[variant]}
        metrics = _keys(of_task.values())
        names = [name for name in ACCURACIES if name in metrics][:1]
        accuracies += [_row(f"{task} {name}", of_task, name, False) for name in names]
        names = [name for name in PERPLEXITIES if name in metrics]
        perplexities += [_row(f"{task} {name}", of_task, name, True) for name in names]
    by_position = results["ppl_by_position"]
    buckets = [_row(f"perplexity at {name}", by_position, name, True) for name in _keys(by_position.values())]
    recall = [
        _row(f"{kind} at {length}", curves, length, False)
        for kind, curves in _recall_curves(results).items()
        for length in _keys(curves.values())
    ]
    return accuracies + _mean(accuracies) + perplexities + buckets + recall


def _row(label: str, by_variant: Mapping[str, Mapping[str, float]], key: str, is_perplexity: bool) -> Row:
    values = {variant: figures[key] for variant, figures in by_variant.items() if key in figures}
    return Row(label, values, is_perplexity)


def _mean(rows: list[Row]) -> list[Row]:
    """The mean over tasks, for the variants that have all of them."""
    complete = [variant for variant in VARIANTS if rows and all(variant in row.values for row in rows)]
    if len(rows) < 2 or not complete:
        return []
    means = {variant: sum(row.values[variant] for row in rows) / len(rows) for variant in complete}
    return [Row(f"mean of the {len(rows)} tasks", means, False)]


def _recall_curves(results: Mapping) -> dict[str, dict[str, dict[str, float]]]:
    """`{kind: {variant: {length: share}}}` from the file's `{variant: {kind: {length: share}}}`."""
    recall = results["recall"]
    return {
        kind: {variant: recall[variant][kind] for variant in recall if kind in recall[variant]}
        for kind in _keys(recall.values())
    }


def _keys(mappings) -> list[str]:
    """The keys of all mappings, each once, in the order in which they come."""
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))


def _cell(row: Row, variant: str) -> str:
    if variant not in row.values:
        return ""
    value, teacher = row.values[variant], row.values.get("teacher")
    text = f"{value:.2f}" if row.is_perplexity else f"{value:.3f}"
    if variant == "teacher" or not teacher:
        return text
    return f"{text} ({value / teacher:.2f}x)" if row.is_perplexity else f"{text} ({100 * value / teacher:.1f}%)"


def _scored(results: Mapping) -> list[str]:
    parts = results["evaluation"]["part_seconds"]
    return [variant for variant in VARIANTS if any(key.startswith(f"{variant}/") for key in parts)]


def _provenance(results: Mapping) -> str:
    environment, evaluation = results["environment"], results["evaluation"]
    versions = ", ".join(f"{name} {environment[name]}" for name in ("torch", "transformers", "lm_eval"))
    dtype = evaluation.get("dtype", {}).get("student") or "no student"
    facts = [results["date"][:10], environment.get("device"), dtype, versions]
    facts += [f"commit {results['commit']}"] if results["commit"] else []
    for task, split in evaluation["splits"].items():
        if split["split"] != split["stock_split"]:
            facts.append(f"{task} on its {split['split']} split (the {split['stock_split']} split is missing)")
    if evaluation["settings"]["limit"] is not None:
        facts.append(f"first {evaluation['settings']['limit']} documents of each task only")
    facts += [f"`{results['command']}`"] if results["command"] else []
    return "; ".join(fact for fact in facts if fact)


def _plot_tasks(axes: Axes, results: Mapping) -> None:
    rows = [row for row in table_rows(results) if row.label.split()[-1] in ACCURACIES]
    variants = _scored(results)
    width = 0.8 / max(len(variants), 1)
    for index, variant in enumerate(variants):
        places = [place + (index - (len(variants) - 1) / 2) * width for place in range(len(rows))]
        heights = [row.values.get(variant, math.nan) for row in rows]
        axes.bar(places, heights, width, color=COLOURS[variant], label=LABELS[variant])
    axes.set_xticks(range(len(rows)), [row.label for row in rows], fontsize=8, rotation=30, ha="right")
    axes.set(title="tasks", ylabel="accuracy", ylim=(0, 1))
    _legend(axes)


def _plot_perplexity(axes: Axes, results: Mapping) -> None:
    for variant, curve in results["ppl_by_position"].items():
        ends = [int(bucket.partition("-")[2]) for bucket in curve]
        axes.plot(ends, list(curve.values()), "o-", color=COLOURS[variant], label=LABELS[variant])
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    _token_axis(axes, _keys(results["ppl_by_position"].values()))
    axes.set(title="perplexity by position", xlabel="tokens read (end of bucket)", ylabel="perplexity")
    axes.grid(alpha=0.3)
    _legend(axes)


def _plot_recall(axes: Axes, results: Mapping) -> None:
    for (kind, curves), style in zip(_recall_curves(results).items(), ("o-", "s--"), strict=False):
        for variant, curve in curves.items():
            lengths = [int(length) for length in curve]
            label = f"{LABELS[variant]}, {kind}"
            axes.plot(lengths, list(curve.values()), style, color=COLOURS[variant], label=label)
    _token_axis(axes, _keys(curve for curves in _recall_curves(results).values() for curve in curves.values()))
    axes.set(title="recall", xlabel="prompt length in tokens", ylabel="share recalled", ylim=(-0.03, 1.03))
    axes.grid(alpha=0.3)
    _legend(axes)


def _token_axis(axes: Axes, names: list[str]) -> None:
    """Logarithmic, with a plain number at each length or at the end of each bucket."""
    ends = sorted({int(name.rpartition("-")[2]) for name in names})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ends, [str(end) for end in ends], fontsize=8)


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)


def _load(results: Mapping | str | Path) -> Mapping:
    return results if isinstance(results, Mapping) else read_results(results)
