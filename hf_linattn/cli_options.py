"""Arguments and options that several commands of the command line share, and how their values are read."""

from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import typer

from hf_linattn.errors import UserError

Source = Annotated[str, typer.Argument(help="Hub id, folder, folder with one GGUF file, or .gguf file.")]
Model = Annotated[
    str | None,
    typer.Argument(
        help="Hub id, folder, folder with one GGUF file, or .gguf file; default: the recipe's.", show_default=False
    ),
]
Folder = Annotated[str, typer.Argument(help="A converted model: folder or Hub id.")]
Output = Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override one setting.")]
Suite = Annotated[
    str,
    typer.Option(
        help="bars, sweep, paper, decode, errors or all (see evals/bench_suites.py); generation for a whole model."
    ),
]
Shapes = Annotated[
    list[str] | None, typer.Option("--shape", metavar="B,H,N,D", help="Batch, heads, tokens, head_dim; repeatable.")
]
Only = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=A,B", help="For the suite generation: contexts, batches, caches or variants; repeatable."
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default: the accelerator, else the CPU.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run of this output folder.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the output folder once the new one is complete.")
]
Seed = Annotated[int | None, typer.Option(help="In place of the seed in the settings.")]
TaskData = Annotated[
    Path | None, typer.Option(help="Folder of <task>/<split>.parquet to score on, instead of the Hub's data.")
]
Text = Annotated[
    Path | None,
    typer.Option(help="File of long documents for perplexity by position; default: Python's own reference."),
]
TrainingText = Annotated[
    str | None,
    typer.Option("--data", help="Training text: Hub dataset id, parquet, JSON lines or text file, or `self`."),
]


def with_seed(overrides: list[str] | None, seed: int | None) -> list[str]:
    """`overrides` with the seed last, where one is given."""
    return [*(overrides or []), *([] if seed is None else [f"seed={seed}"])]


def read_list(text: str) -> list[str]:
    """The parts of a comma separated list; none of `none`."""
    return [] if text == "none" else [part.strip() for part in text.split(",") if part.strip()]


def read_numbers(option: str, text: str, count: int | None = None) -> list[int]:
    """`count` positive integers, or any number of them. Raises UserError, which names `option`."""
    parts = read_list(text)
    if not all(part.isdigit() and int(part) for part in parts) or len(parts) != (count or len(parts)):
        raise UserError(f"{option}: expected {count or 'some'} positive numbers with commas between, got {text!r}")
    return [int(part) for part in parts]


def read_choices(option: str, texts: list[str], names: Collection[str]) -> dict[str, list[str]]:
    """{name: parts} of texts NAME=A,B, for each of `names` at most once. Raises UserError, which names `option`."""
    chosen = {}
    for text in texts:
        name, _, values = text.partition("=")
        if name not in names or name in chosen or not read_list(values):
            raise UserError(f"{option}: expected NAME=A,B, each once, of {', '.join(names)}; got {text!r}")
        chosen[name] = read_list(values)
    return chosen
