"""The results blocks of README, from the files under evals/results: `python tests/readme_results.py` rewrites them.

tests/test_docs.py fails while a block differs from what the files say, so that no number in it is typed by hand. The
block of the kernels is filled once evals/results/kernels holds a file.
"""

import json
import re
from pathlib import Path

from hf_linattn.evals.report import table_rows
from hf_linattn.evals.results_file import read_results

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "evals" / "results"
# Rows of the table of the kernels, in this order; the others stay in the file.
KERNEL_IMPLS = ("ours", "fla", "fla-unnormalized", "mlstm", "sdpa-flash", "sdpa-cudnn")
VARIANTS = ("teacher", "student", "window_only")
NONE_YET = "No result is committed yet. `hf-linattn convert` writes the same figures for your own model.\n"


def results_block(folder: Path = RESULTS) -> str:
    """Markdown for every results file in `folder`: three lines each, and where they come from."""
    files = sorted(path for path in folder.glob("*/*.json") if path.parent.name not in ("kernels", "ablations"))
    if not files:
        return NONE_YET
    lines = ["| recipe | measured | teacher | converted | its window alone |", "|---|---|---|---|---|"]
    notes = []
    for number, path in enumerate(files, start=1):
        results = read_results(path)
        for first, row in enumerate(_telling_rows(results)):
            label = f"`{results['recipe']}` [{number}]" if first == 0 else ""
            cells = " | ".join(_cell(row, variant) for variant in VARIANTS)
            lines.append(f"| {label} | {row.label} | {cells} |")
        notes.append(_note(number, path, results))
    return "\n".join([*lines, "", *notes]) + "\n"


def kernel_results_block(folder: Path = RESULTS) -> str | None:
    """Markdown for the newest file of evals/results/kernels; None without one."""
    files = [(json.loads(path.read_text(encoding="utf-8")), path) for path in folder.glob("kernels/*.json")]
    if not files:
        return None
    results, path = max(files, key=lambda found: max(found[0]["runs"]))
    rows = [row for row in results["rows"] if row["suite"] == "bars" and row["impl"] in KERNEL_IMPLS]
    lines = [
        "| B, H, N, D | | forward, ms | forward + backward, ms | extra memory, MiB |",
        "|---|---|---|---|---|",
    ]
    for shape in dict.fromkeys(tuple(row[name] for name in "BHND") for row in rows):
        of_shape = {row["impl"]: row for row in rows if tuple(row[name] for name in "BHND") == shape}
        label = ", ".join(map(str, shape))
        for impl in (impl for impl in KERNEL_IMPLS if impl in of_shape):
            row = of_shape[impl]
            cells = " | ".join(_multiple(row, kind) for kind in ("fwd", "fwd_bwd"))
            extra = "" if row["extra_mib"] is None else f"{row['extra_mib']:.0f}"
            lines.append(f"| {label} | `{impl}` | {cells} | {extra} |")
            label = ""
    where = path.relative_to(ROOT).as_posix()
    is_beside_peers = any(not row["impl"].startswith(("ours", "chunked", "sdpa")) for row in rows)
    peers = ", ".join(f"{name} {version}" for name, version in results["peers"].items() if is_beside_peers)
    runs = {date: results["runs"][date] for date in sorted({row["run"] for row in rows})}
    rates = [run["copy_gbs"] for run in runs.values()]
    commits = sorted({run["commit"] for run in runs.values() if run["commit"]})
    facts = [min(runs)[:10], results["device"], f"torch {results['torch']}", *([peers] if peers else [])]
    facts.append("copy " + " to ".join(f"{rate:.0f}" for rate in sorted({min(rates), max(rates)})) + " GB/s")
    facts += [f"commit {', '.join(commits)}"] if commits else []
    note = f"Medians of {', '.join(facts)}; in brackets the multiple of the byte floor; "
    return "\n".join([*lines, "", f"{note}all figures and commands: [{where}]({where})."]) + "\n"


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
    return readme if kernels is None else fill(readme, kernels, "kernel results")


def _telling_rows(results: dict) -> list:
    """The mean over tasks, and the figures that lie farthest from the window: what a short task cannot show."""
    rows = table_rows(results)
    groups = ("mean of the", "wikitext word_perplexity", "perplexity at", "passkey at", "mqar at")
    of_group = [[row for row in rows if row.label.startswith(group)] for group in groups]
    return [found[-1] for found in of_group if found]


def _cell(row, variant: str) -> str:
    if variant not in row.values:
        return ""
    return f"{row.values[variant]:.2f}" if row.is_perplexity else f"{row.values[variant]:.3f}"


def _note(number: int, path: Path, results: dict) -> str:
    facts = [f"{results['date'][:10]}", str(results["environment"].get("device"))]
    if results["tokens"]:
        facts.append(f"{results['tokens'] / 1e6:.1f}M training tokens in {results['seconds'] / 60:.1f} minutes")
    if results["commit"]:
        facts.append(f"commit {results['commit']}")
    where = path.relative_to(ROOT).as_posix()
    command = results["command"].splitlines()[0]
    return f"[{number}] {', '.join(facts)}; `{command}`; all figures and commands: [{where}]({where})."


def _multiple(row: dict, kind: str) -> str:
    ms = row[f"{kind}_ms"]
    return "" if ms is None else f"{ms:.3f} ({ms / row[f'floor_{kind}_ms']:.1f}x)"


if __name__ == "__main__":
    (ROOT / "README.md").write_text(filled_readme(), encoding="utf-8")
