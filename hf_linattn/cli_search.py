"""Behind `ablate` and `select-layers`: how a recipe is found, by short runs and by what each layer recalls.

Part of the command line, so that it may see conversion and evals. Nothing is saved but figures.
"""

import datetime
import gc
import logging
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from hf_linattn.errors import UserError
from hf_linattn.info import check_device
from hf_linattn.loading import load_model
from hf_linattn.sample_text import write_sample_text

logger = logging.getLogger(__name__)
TEACHER = "teacher"


class Variant(NamedTuple):
    """A recipe by name, and the overrides `A.B=C` that make it."""

    name: str
    overrides: tuple[str, ...]


def read_variants(texts: Sequence[str]) -> list[Variant]:
    """`"NAME A.B=C A.B=C"`, each in the quoting of a shell.

    Raises:
        UserError: no variant, one without a name, or a name twice.
    """
    variants = []
    for text in texts:
        name, *overrides = shlex.split(text) or [""]
        if not name or set("=/") & set(name) or name == TEACHER:
            raise UserError(f"--variant: expected 'NAME A.B=C ...', a name of its own first, got {text!r}")
        if name in [variant.name for variant in variants]:
            raise UserError(f"--variant: expected every name once, got {name!r} twice; rename one")
        variants.append(Variant(name, tuple(overrides)))
    if not variants:
        raise UserError("--variant: expected at least one, e.g. --variant base --variant 'w64 attention.window=64'")
    return variants


def ablate(
    model: str,
    variants: Sequence[Variant],
    output: Path,
    *,
    recipe: str | None,
    overrides: Sequence[str] = (),
    data: str | None = None,
    text: Path | None = None,
    tasks: Sequence[str] = (),
    task_data: Path | None = None,
    device: str | None = None,
) -> dict:
    """Train and score every variant, one after the other; `output` is rewritten after each.

    Args:
        model (`str`): Hub id, folder, or folder with one GGUF file.
        variants (`Sequence[Variant]`): their overrides come after `overrides`.
        output (`Path`): JSON file.
        recipe (`str`, *optional*): name or file; None takes `standard`.
        overrides (`Sequence[str]`): `A.B=C` for all variants.
        data (`str`, *optional*): training text in place of the recipe's.
        text (`Path`, *optional*): long documents for perplexity by position; None takes `sample_text`.
        tasks, task_data: of lm-eval, as in `evals.run.evaluate`.
        device (`str`, *optional*): as for `convert`.

    Returns:
        The content of `output`: `variants` maps each name to its overrides, tokens, seconds of training, peak memory,
        divergence on held-out rows after each stage, and what `evaluate` measured of it.

    Raises:
        UserError: a recipe that does not read, checked for every variant before the first is trained.
    """
    from hf_linattn.conversion.config import load_recipe
    from hf_linattn.conversion.execution import device_name, make_accelerator
    from hf_linattn.conversion.result_folder import display_name
    from hf_linattn.evals.results_file import checkout_commit, write_results

    configs = {variant.name: load_recipe(recipe, (*overrides, *variant.overrides)) for variant in variants}
    if data is not None:
        configs = {n: c.model_copy(update={"data": c.data.with_source(data)}) for n, c in configs.items()}
    accelerator = make_accelerator(device)
    results = {
        "model": display_name(model, None),
        "recipe": next(iter(configs.values())).name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": checkout_commit(),
        "device": device_name(accelerator.device),
        "command": shlex.join(["hf-linattn", *sys.argv[1:]]),
        "variants": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        settings = {"tasks": tasks, "task_data": task_data, "text": text}
        first = next(iter(configs.values()))
        results["variants"][TEACHER] = _teacher(model, first, accelerator, settings, Path(folder))
        for variant in variants:
            logger.info("ablate: %s %s", variant.name, shlex.join(variant.overrides))
            found = _run(model, variant.name, configs[variant.name], accelerator, settings, Path(folder))
            results["variants"][variant.name] = {"overrides": list(variant.overrides)} | found
            write_results(output, results)
    _print(results)
    return results


def select_layers(
    model: str,
    count: int,
    data: str | None,
    *,
    window: int,
    rows: int,
    length: int,
    output: Path | None,
    device: str | None,
    seed: int | None,
) -> None:
    """Search for the layers of `model` that should stay softmax and print them as an override.

    Args:
        model (`str`): Hub id, folder, or folder with one GGUF file.
        count (`int`): number of layers.
        data (`str`, *optional*): text that layers are compared on; None takes the standard recipe's.
        window, rows, length (`int`): of the other layers; rows and tokens a row of the text.
        output (`Path`, *optional*): JSON file.
        device, seed: None for the accelerator, and for 0.
    """
    from hf_linattn.conversion.config import DataConfig
    from hf_linattn.conversion.execution import choose_dtype
    from hf_linattn.conversion.layer_selection import select_layers as search
    from hf_linattn.evals.results_file import write_results

    place = check_device(device)
    dtype = choose_dtype("auto", place)
    teacher, tokenizer = load_model(model, dtype=dtype, device=place)
    text = DataConfig() if data is None else DataConfig().with_source(data)
    options = {"window": window, "rows": rows, "sequence_length": length, "seed": seed or 0}
    layers, rounds = search(teacher, tokenizer, text, count, dtype=dtype, **options)
    if output is not None:
        write_results(output, {"model": Path(model).name, **options, "layers": list(layers), "rounds": rounds})
    Console().print(f"--set attention.softmax_layers={list(layers)}", markup=False, highlight=False, soft_wrap=True)


def _teacher(model: str, config, accelerator, settings: dict, folder: Path) -> dict:
    from hf_linattn.conversion.execution import choose_dtype

    dtype = choose_dtype(config.dtype, accelerator.device)
    teacher, tokenizer = load_model(model, dtype=dtype, device=accelerator.device)
    return _score({"teacher": teacher}, tokenizer, config, settings, folder)


def _run(model: str, name: str, config, accelerator, settings: dict, folder: Path) -> dict:
    from hf_linattn.conversion.corpus_source import check_row_length
    from hf_linattn.conversion.execution import choose_dtype, peak_gib, repeatable
    from hf_linattn.conversion.pipeline import train_student
    from hf_linattn.conversion.result_folder import summarize
    from hf_linattn.conversion.run_state import open_run

    is_cuda = accelerator.device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(accelerator.device)
    started = time.perf_counter()
    identity = {"command": "ablate", "model": model, "gguf_file": None}
    dtype = choose_dtype(config.dtype, accelerator.device)
    with (
        open_run(folder / name, identity, accelerator, resume=False, overwrite=True) as run,
        repeatable(config.deterministic),
    ):
        teacher, tokenizer = load_model(model, dtype=dtype, device=accelerator.device)
        check_row_length(teacher, config.longest_row)
        student = train_student(
            accelerator, run, config, teacher, tokenizer, (model, None), dtype, corpus_folder=folder / "data"
        )
        summary = summarize(name, run, identity, student, accelerator, config)
        run.remove()
    found = {key: summary[key] for key in ("tokens", "seconds", "seed", "stages", "validation")}
    found |= {"peak_gib": round(peak_gib(accelerator.device), 2), "wall_seconds": time.perf_counter() - started}
    found |= _score({"student": student}, tokenizer, config, settings, folder)
    del student, teacher
    accelerator.free_memory()
    gc.collect()
    if is_cuda:
        torch.cuda.empty_cache()
    return found


def _score(model: dict, tokenizer, config, settings: dict, folder: Path) -> dict:
    """What `evaluate` finds of the one model in `model`, by the name of its variant."""
    from hf_linattn.evals.run import evaluate

    [(variant, scored)] = model.items()
    wanted = config.evaluation
    length = min(wanted.perplexity_length, getattr(scored.config, "max_position_embeddings", wanted.perplexity_length))
    lengths = [n for n in wanted.recall_lengths if n <= length]
    variants = [variant]
    if variant == "student" and scored.config.linear_attention_config["window"]:
        variants.append("window_only")
    results = evaluate(
        scored,
        tokenizer,
        teacher=scored if variant == TEACHER else None,
        variants=variants,
        tasks=settings["tasks"],
        task_data=settings["task_data"],
        text=settings["text"] or write_sample_text(folder, length),
        text_length=length,
        recall_lengths=lengths,
        recall_trials=wanted.recall_trials,
        limit=wanted.limit,
        batch_size=wanted.batch_size,
    )
    found = {name: results[name] for name in variants if results[name]}
    return found | {"ppl_by_position": results["ppl_by_position"], "recall": results["recall"]}


def _print(results: dict) -> None:
    """KL after the last stage, perplexity in the last bucket of positions, recall at the longest prompt."""
    table = Table("variant", "tokens", "seconds", "KL", "perplexity", "passkey", "mqar")
    for name, found in results["variants"].items():
        kind = TEACHER if name == TEACHER else "student"
        kl = [measured["kl"] for measured in found.get("validation", {}).values() if "kl" in measured]
        bucket, perplexity = list(found["ppl_by_position"][kind].items())[-1]
        recall = [list(curve.items())[-1] for curve in found["recall"].get(kind, {}).values()]
        table.add_row(
            name,
            f"{found['tokens']:,}" if "tokens" in found else "",
            f"{found['seconds']:.0f}" if "seconds" in found else "",
            f"{kl[-1]:.4f}" if kl else "",
            f"{perplexity:.2f} at {bucket}",
            *(f"{share:.3f} at {length}" for length, share in recall),
        )
    Console().print(table)
