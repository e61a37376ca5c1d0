"""The evaluation behind `convert`, `eval` and `bench`: which models, which text, where the report goes.

Part of the command line, so that it may see conversion and evals; imported by its commands.
"""

import datetime
import json
import logging
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer

from hf_linattn.cli_options import read_choices, read_numbers
from hf_linattn.errors import UserError
from hf_linattn.info import check_device, device_name, model_facts
from hf_linattn.loading import load_weights
from hf_linattn.sample_text import write_sample_text

logger = logging.getLogger(__name__)
RESULTS_NAME, TEXT_LENGTH = "evaluation", 8192


def check_evaluation_input(tasks, task_data: Path | None, text: Path | None) -> None:
    """Find out before a conversion, not after it, that its evaluation cannot run."""
    from hf_linattn.evals.task_data import leaf_tasks, write_local_tasks
    from hf_linattn.evals.text_files import read_documents

    if text is not None:
        read_documents(text)
    for name in tasks:
        leaf_tasks(name)
    if task_data is not None:
        with tempfile.TemporaryDirectory() as folder:
            write_local_tasks(task_data, tasks, folder)


def score(
    folder: str, teacher: str | None, settings: dict, *, report: Path | None, text: Path | None, device: str | None
) -> None:
    """Score `folder`, print the table and write the report.

    Args:
        folder (`str`): converted model, folder or Hub id.
        teacher (`str`, *optional*): the model before conversion.
        settings (`dict`): further arguments of `evals.run.evaluate`; lengths beyond the model's positions are dropped.
        report (`Path`, *optional*): folder for JSON, Markdown and plots; a model card in it gets them as well.
        text (`Path`, *optional*): for perplexity by position; None takes `sample_text`.
        device (`str`, *optional*): None takes the accelerator, else the CPU.
    """
    from hf_linattn.evals.report import print_results
    from hf_linattn.evals.run import evaluate as run_evaluation

    facts = model_facts(folder)
    variants = ("teacher", "student", "window_only") if facts.attention["window"] else ("teacher", "student")
    text_length = min(settings.get("text_length", TEXT_LENGTH), facts.max_positions)
    lengths = [n for n in settings["recall_lengths"] if n <= facts.max_positions]

    def progress(part: str, done: int, total: int) -> None:
        logger.info("evaluation: %d of %d, %s", done, total, part)

    with tempfile.TemporaryDirectory() as temporary:
        results = run_evaluation(
            lambda: load_weights(folder, dtype=facts.dtype),
            AutoTokenizer.from_pretrained(folder),
            teacher=None if teacher is None else lambda: load_weights(teacher, dtype=facts.dtype),
            **{"variants": variants} | settings | {"text_length": text_length, "recall_lengths": lengths},
            text=text or write_sample_text(temporary, text_length),
            device=check_device(device),
            command=shlex.join(["hf-linattn", *sys.argv[1:]]),
            output=None if report is None else report / f"{RESULTS_NAME}.json",
            progress=progress,
        )
    print_results(results)
    if report is not None:
        _write_report(report, results)


def measure_ops(
    suite: str,
    sizes: list[list[int]],
    *,
    backends: list[str] | None,
    skip: Sequence[str],
    dtype: str | None,
    runs: int,
    output: Path | None,
    device: str | None,
) -> None:
    """Run one suite of evals/bench_suites.py, or all, print the tables, and keep them in `output`.

    Args:
        suite (`str`): its name, or "all".
        sizes (`list`): [B, H, N, D] of the timing suites, instead of their own.
        backends, skip: names to run, and beginnings of names to leave out; see `evals.bench.run_suite`.
        dtype (`str`, *optional*): of the inputs; None takes bfloat16 on a GPU and float32 on a CPU.
        runs (`int`): least number of timed runs.
        output (`Path`, *optional*): results file, in the form in which evals/results/kernels keeps them.
        device (`str`, *optional*): None takes the accelerator, else the CPU.
    """
    from rich.console import Console

    from hf_linattn.evals.bench import collect, run_suite
    from hf_linattn.evals.bench_entries import Shape
    from hf_linattn.evals.bench_report import peer_versions, plot_results, print_bench, write_bench
    from hf_linattn.evals.bench_suites import SUITES
    from hf_linattn.evals.bench_timing import copy_bandwidth
    from hf_linattn.evals.results_file import checkout_commit

    if suite not in (*SUITES, "all"):
        raise UserError(f"--suite: expected one of {', '.join(SUITES)} or all, got {suite!r}")
    where = check_device(device)
    dtype = getattr(torch, dtype or ("bfloat16" if where.type == "cuda" else "float32"))
    bandwidth = copy_bandwidth(where)
    facts = {
        "device": device_name(where),
        "copy_gbs": round(bandwidth / 1e9, 1),
        "torch": torch.__version__,
        "peers": peer_versions(),
        "commit": checkout_commit(),
        "command": shlex.join(["hf-linattn", *sys.argv[1:]]),
    }
    options = {"shapes": [Shape(*size) for size in sizes] or None, "backends": backends, "skip": skip, "runs": runs}
    for name in SUITES if suite == "all" else (suite,):
        facts |= {"suite": name, "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
        measured = []
        try:
            for section, row in run_suite(name, where, dtype, bandwidth=bandwidth, **options):
                measured.append((section, row))
                if output is not None:
                    write_bench(output, facts, {section: [row]})
        except ValueError as error:
            raise UserError(f"--backend: {error}") from error
        print_bench(collect(measured), Console())
    if output is not None:
        logger.info("wrote %s", ", ".join(map(str, (output, *plot_results(output)))))


def measure_generation(
    model: str | None, only: Sequence[str], *, runs: int, output: Path | None, device: str | None
) -> None:
    """Tokens a second and memory of `generate`, beside the softmax that the model had; print a table, keep JSON.

    Args:
        model (`str`, *optional*): a converted model; None is an error that says so.
        only (`Sequence[str]`): the option `--only`: which contexts, batches, caches and variants, by default all.
        runs (`int`): timed calls of each combination.
        output (`Path`, *optional*): JSON file, rewritten after every row.
        device (`str`, *optional*): None takes the accelerator, else the CPU.
    """
    from rich.console import Console
    from rich.table import Table

    from hf_linattn.evals.generation import CACHES, FIELDS, VARIANTS, generation_speed
    from hf_linattn.evals.results_file import checkout_commit, write_results

    if model is None:
        raise UserError("--model: expected a converted model for the suite generation, got none")
    chosen = read_choices("--only", only, ("contexts", "batches", "caches", "variants"))
    for name in {"contexts", "batches"} & set(chosen):
        chosen[name] = read_numbers(f"--only {name}", ",".join(chosen[name]))
    for name, known in (("caches", CACHES), ("variants", VARIANTS)):
        if unknown := sorted(set(chosen.get(name, ())) - set(known)):
            raise UserError(f"--only {name}: expected {' or '.join(known)}, got {unknown[0]!r}")
    facts, where = model_facts(model), check_device(device)
    loaded = load_weights(model, dtype=facts.dtype, device=where)
    results = {
        "model": Path(model).name,
        "device": device_name(where),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": checkout_commit(),
        "command": shlex.join(["hf-linattn", *sys.argv[1:]]),
        "rows": [],
    }
    # Small where nothing but the path can be shown.
    sizes = {} if where.type == "cuda" else {"contexts": (64, 256), "batches": (1,), "new_tokens": (2, 6)}
    for row in generation_speed(loaded, runs=runs, **sizes | chosen):
        results["rows"].append(row)
        if output is not None:
            write_results(output, results)
    table = Table(*FIELDS)
    for row in results["rows"]:
        cells = (f"{x:.4g}" if isinstance(x, float) else str(x) for x in row.values())
        table.add_row(*("" if cell == "None" else cell for cell in cells))
    Console().print(table)


def _write_report(folder: Path, results: dict) -> None:
    from hf_linattn.conversion.model_card import write_model_card
    from hf_linattn.evals.report import results_table, write_report

    table, plot = write_report(results, folder, RESULTS_NAME)
    summary = folder / "conversion.json"
    if summary.is_file():
        values = json.loads(summary.read_text(encoding="utf-8"))
        write_model_card(folder, values, results, results_table(results), (plot.name,))
    logger.info("wrote %s, %s and %s", folder / f"{RESULTS_NAME}.json", table, plot)
