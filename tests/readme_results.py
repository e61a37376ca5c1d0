"""The results blocks of README, from the files under evals/results: `python tests/readme_results.py` rewrites them.

tests/test_docs.py fails while a block differs from what the files say, so that no number in it is typed by hand. The
block of the kernels is filled once evals/results/kernels holds a file.
"""

import json
import re
from pathlib import Path

from hf_linattn.evals.report import Row, table_rows
from hf_linattn.evals.results_file import read_results

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "evals" / "results"
# Rows of the table of the kernels, in this order; the others stay in the file.
KERNEL_IMPLS = ("ours", "ours-window", "fla", "fla-unnormalized", "mlstm", "sdpa-flash", "sdpa-cudnn")
# The generation file that README shows: the others hold parts of the table on other cards.
GENERATION = RESULTS / "generation" / "smollm2-135m-pure-nvidia-h200-2026-11-26.json"
# Folders whose files are not of one conversion.
OTHER_RESULTS = ("kernels", "ablations", "generation", "larger-models", "whole-conversion")
VARIANTS = ("teacher", "student", "window_only")
NONE_YET = "No result is committed yet. `hf-linattn convert` writes the same figures for your own model.\n"


def results_block(folder: Path = RESULTS) -> str:
    """Markdown for the newest results of every recipe in `folder`, means over seeds, and where they come from."""
    paths = sorted(path for path in folder.glob("*/*.json") if path.parent.name not in OTHER_RESULTS)
    if not paths:
        return NONE_YET
    lines = ["| recipe | measured | teacher | converted | its window alone |", "|---|---|---|---|---|"]
    notes = []
    for number, runs in enumerate(_newest_runs(paths), start=1):
        rows = [_telling_rows(results) for _, results in runs]
        for label in rows[0]:
            recipe = f"`{runs[0][1]['recipe']}` [{number}]" if label == next(iter(rows[0])) else ""
            cells = " | ".join(_cell([of_run[label] for of_run in rows if label in of_run], v) for v in VARIANTS)
            lines.append(f"| {recipe} | {label} | {cells} |")
        notes.append(_note(number, runs))
    return "\n".join([*lines, "", *notes]) + "\n"


def kernel_results_block(folder: Path = RESULTS) -> str | None:
    """Markdown for the newest file of evals/results/kernels; None without one."""
    files = [(json.loads(path.read_text(encoding="utf-8")), path) for path in folder.glob("kernels/*.json")]
    if not files:
        return None
    results, path = max(files, key=lambda found: max(found[0]["runs"]))
    rows = [row for row in results["rows"] if row["suite"] == "bars" and row["impl"] in KERNEL_IMPLS]
    lines = [
        "| B, H, N, D | | forward, ms | forward + backward, ms | as a CUDA graph | extra memory, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for shape in dict.fromkeys(tuple(row[name] for name in "BHND") for row in rows):
        of_shape = {row["impl"]: row for row in rows if tuple(row[name] for name in "BHND") == shape}
        label = ", ".join(map(str, shape))
        for impl in (impl for impl in KERNEL_IMPLS if impl in of_shape):
            row = of_shape[impl]
            cells = " | ".join(_multiple(row, kind) for kind in ("fwd", "fwd_bwd", "fwd_bwd_graph"))
            extra = "" if row["extra_mib"] is None else f"{row['extra_mib']:.0f}"
            lines.append(f"| {label} | `{impl}` | {cells} | {extra} |")
            label = ""
    where = path.relative_to(ROOT).as_posix()
    peer_runs = {row["run"] for row in rows if not row["impl"].startswith(("ours", "chunked", "sdpa"))}
    versions = {f"{name} {version}" for run in peer_runs for name, version in results["runs"][run]["peers"].items()}
    peers = ", ".join(sorted(versions))
    runs = {date: results["runs"][date] for date in sorted({row["run"] for row in rows})}
    rates = [run["copy_gbs"] for run in runs.values()]
    commits = sorted({run["commit"] for run in runs.values() if run["commit"]})
    days = " to ".join(sorted({min(runs)[:10], max(runs)[:10]}))
    facts = [days, results["device"], f"torch {results['torch']}", *([peers] if peers else [])]
    facts.append("copy " + " to ".join(f"{rate:.0f}" for rate in sorted({min(rates), max(rates)})) + " GB/s")
    facts += [f"commit {', '.join(commits)}"] if commits else []
    note = f"Medians of {', '.join(facts)}; in brackets the multiple of the byte floor; "
    return "\n".join([*lines, "", f"{note}all figures and commands: [{where}]({where})."]) + "\n"


def generation_results_block() -> str:
    """Markdown for `GENERATION`: static caches, softmax in Transformers' own `generate` beside the converted model."""
    results = json.loads(GENERATION.read_text(encoding="utf-8"))
    rows = {(row["variant"], row["batch"], row["context"]): row for row in results["rows"]}
    lines = [
        "| rows | tokens | softmax, ms a step | converted | tokens/s | softmax, cache (peak) MiB | converted |",
        "|---|---|---|---|---|---|---|",
    ]
    for batch, context in dict.fromkeys((batch, context) for _, batch, context in rows):
        pair = rows["softmax", batch, context], rows["student", batch, context]
        steps = " | ".join(f"{row['step_ms']:.2f}" for row in pair)
        rates = " / ".join(f"{row['tokens_per_s']:,.0f}" for row in pair)
        memory = " | ".join(f"{row['cache_mib']:,.0f} ({row['peak_mib']:,.0f})" for row in pair)
        lines.append(f"| {batch} | {context:,} | {steps} | {rates} | {memory} |")
    commits = ", ".join(dict.fromkeys(row.get("commit", results["commit"]) for row in results["rows"]))
    days = " and ".join(sorted({row.get("date", results["date"])[:10] for row in results["rows"]}))
    where = GENERATION.relative_to(ROOT).as_posix()
    facts = f"{results['device']}, {days}, torch {results['torch']}, commit {commits}"
    return "\n".join([*lines, "", f"{facts}; all figures and the command: [{where}]({where})."]) + "\n"


def fill(readme: str, block: str, name: str = "results") -> str:
    """`readme` with `block` between the markers of this name."""
    markers = re.compile(rf"(<!-- {name} -->\n)(.*?)(<!-- /{name} -->)", re.DOTALL)
    filled, count = markers.subn(lambda match: match[1] + block + match[3], readme)
    if count != 1:
        raise ValueError(f"README: expected one <!-- {name} --> block, found {count}")
    return filled


def filled_readme() -> str:
    """README as the results files say it should read."""
    readme = fill((ROOT / "README.md").read_text(encoding="utf-8"), results_block())
    kernels = kernel_results_block()
    if kernels is not None:
        readme = fill(readme, kernels, "kernel results")
    return fill(readme, generation_results_block(), "generation results")


def _newest_runs(paths: list[Path]) -> list[list[tuple[Path, dict]]]:
    """For every recipe, the files of its newest day, one a seed."""
    by_recipe: dict[str, list[tuple[Path, dict]]] = {}
    for path in paths:
        results = read_results(path)
        by_recipe.setdefault(results["recipe"], []).append((path, results))
    newest = [max(results["date"][:10] for _, results in runs) for runs in by_recipe.values()]
    return [
        sorted((run for run in runs if run[1]["date"][:10] == day), key=lambda run: run[1].get("seed") or 0)
        for runs, day in zip(by_recipe.values(), newest, strict=True)
    ]


def _telling_rows(results: dict) -> dict[str, Row]:
    """The mean over tasks, and the figures that lie farthest from the window: what a short task cannot show."""
    rows = {row.label: row for row in table_rows(results)}
    groups = ("mean of the", "lambada_openai perplexity", "wikitext word_perplexity", "perplexity at")
    wanted = [[label for label in rows if label.startswith(group)][-1:] for group in groups]
    for kind in ("passkey at", "mqar at"):
        of_kind = [label for label in rows if label.startswith(kind)]
        wanted.append([label for label in of_kind if label == f"{kind} 1024" or label == of_kind[-1]])
    return {label: rows[label] for labels in wanted for label in labels}


def _cell(rows: list[Row], variant: str) -> str:
    """The mean over seeds, and how far one of them is from it where there are several."""
    values = [row.values[variant] for row in rows if variant in row.values]
    if not values:
        return ""
    mean, digits = sum(values) / len(values), 2 if rows[0].is_perplexity else 3
    spread = max(abs(value - mean) for value in values)
    return f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if len(values) > 1 else "")


def _note(number: int, runs: list[tuple[Path, dict]]) -> str:
    results = runs[0][1]
    facts = [f"{results['date'][:10]}", str(results["environment"].get("device"))]
    if results["tokens"]:
        minutes = sum(run["seconds"] for _, run in runs) / len(runs) / 60
        facts.append(f"{results['tokens'] / 1e6:.1f}M training tokens in {minutes:.1f} minutes")
    if len(runs) > 1:
        facts.append(f"{len(runs)} seeds (teacher and window alone: one)")
    if results["commit"]:
        facts.append(f"commit {results['commit']}")
    places = [path.relative_to(ROOT).as_posix() for path, _ in runs]
    command = results["command"].splitlines()[0]
    links = ", ".join(f"[{where}]({where})" for where in places)
    return f"[{number}] {', '.join(facts)}; `{command}`; all figures and commands: {links}."


def _multiple(row: dict, kind: str) -> str:
    ms = row[f"{kind}_ms"]
    return "" if ms is None else f"{ms:.3f} ({ms / row['floor_' + kind.removesuffix('_graph') + '_ms']:.1f}x)"


if __name__ == "__main__":
    (ROOT / "README.md").write_text(filled_readme(), encoding="utf-8")
