"""The results block of README, from the files under evals/results: `python tests/readme_results.py` rewrites it.

tests/test_docs.py fails while the block differs from what the files say, so that no number in it is typed by hand.
"""

import re
from pathlib import Path

from hf_linattn.evals.report import table_rows
from hf_linattn.evals.results_file import read_results

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "evals" / "results"
BLOCK = re.compile(r"(<!-- results -->\n)(.*?)(<!-- /results -->)", re.DOTALL)
VARIANTS = ("teacher", "student", "window_only")
NONE_YET = "No result is committed yet. `hf-linattn convert` writes the same figures for your own model.\n"


def results_block(folder: Path = RESULTS) -> str:
    """Markdown for every results file in `folder`: three lines each, and where they come from."""
    files = sorted(path for path in folder.glob("*/*.json") if path.parent.name != "kernels")
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


def fill(readme: str, block: str) -> str:
    """`readme` with `block` between its markers."""
    filled, count = BLOCK.subn(lambda match: match[1] + block + match[3], readme)
    if count != 1:
        raise ValueError(f"README: expected one <!-- results --> block, found {count}")
    return filled


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


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(fill(readme.read_text(encoding="utf-8"), results_block()), encoding="utf-8")
