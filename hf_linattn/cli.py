"""The command line: `hf-linattn COMMAND`, the same as `python -m hf_linattn COMMAND`.

Commands choose and redirect (model, recipe, data, output, device, resume); what a run does is in its recipe. This is
the only module that sees conversion and evals. It imports them, torch and transformers inside the commands, so that
`--help` stays quick. A failure that the user can mend ends as one message on stderr and exit code 1.
"""

import logging
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from hf_linattn.cli_errors import IS_MAIN_PROCESS, CommandGroup
from hf_linattn.cli_options import (
    Device,
    Folder,
    Model,
    Output,
    Overrides,
    Overwrite,
    Resume,
    Seed,
    TaskData,
    Text,
    TrainingText,
)
from hf_linattn.errors import UserError

logger = logging.getLogger(__name__)

RESULTS_NAME, TEXT_LENGTH = "evaluation", 8192


app = typer.Typer(
    cls=CommandGroup,
    name="hf-linattn",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Say nothing of what is going on.")] = False,
) -> None:
    """Convert pretrained Hugging Face decoders from softmax attention to linear attention."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("hf_linattn").setLevel(logging.INFO if IS_MAIN_PROCESS and not quiet else logging.ERROR)


@app.command()
def convert(
    model: Model = None,
    output: Output = ...,
    recipe: Annotated[str | None, typer.Option(help="Name (see `recipes`) or YAML file; default: by size.")] = None,
    overrides: Overrides = None,
    data: TrainingText = None,
    task_data: TaskData = None,
    text: Text = None,
    resume: Resume = False,
    device: Device = None,
    seed: Seed = None,
    overwrite: Overwrite = False,
    no_eval: Annotated[bool, typer.Option("--no-eval", help="Skip the evaluation.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the recipe that would run, and stop.")] = False,
) -> None:
    """Linearize MODEL, distil it, merge, save, evaluate and report: from checkpoint to scored folder."""
    from hf_linattn.conversion.config import load_recipe

    config = load_recipe(recipe or _pick_recipe(model, device), _with_seed(overrides, seed))
    model = model or config.model
    if model is None:
        raise UserError(
            f"MODEL: recipe {config.name!r} names no model of its own; give a Hub id, folder or .gguf file"
        )
    if dry_run:
        _print_settings(config, f"{model} -> {output}" + (f", data {data}" if data else ""))
        return
    evaluation = config.evaluation
    if not no_eval and IS_MAIN_PROCESS:
        _check_evaluation_input(evaluation.tasks, task_data, text)

    from hf_linattn.conversion.pipeline import convert as run_conversion

    summary = run_conversion(model, output, config, data=data, resume=resume, overwrite=overwrite, device=device)
    if not IS_MAIN_PROCESS:
        return
    logger.info("%s is complete", output)
    if no_eval:
        return
    logger.info("evaluating; to repeat it: hf-linattn eval %s --teacher %s -o %s", output, model, output)
    _evaluate(
        str(output),
        model,
        report=output,
        reuse=resume,
        tasks=evaluation.tasks,
        task_data=task_data,
        text=text,
        limit=evaluation.limit,
        batch_size=evaluation.batch_size,
        recall_lengths=evaluation.recall_lengths,
        recall_trials=evaluation.recall_trials,
        text_length=evaluation.perplexity_length,
        device=device,
        conversion={name: summary[name] for name in ("recipe", "tokens", "seconds", "peak_gib", "seed")},
    )


@app.command()
def finetune(
    folder: Folder,
    output: Output,
    data: TrainingText = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of fine-tuning settings.")] = None,
    overrides: Overrides = None,
    resume: Resume = False,
    device: Device = None,
    seed: Seed = None,
    overwrite: Overwrite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the settings that would run, and stop.")] = False,
) -> None:
    """Keep training a converted model on next tokens, with LoRA (merged at the end) or in full."""
    from hf_linattn.conversion.config import load_finetune_config

    settings = load_finetune_config(config, _with_seed(overrides, seed))
    if dry_run:
        _print_settings(settings, f"{folder} -> {output}" + (f", data {data}" if data else ""))
        return

    from hf_linattn.conversion.finetune import finetune as run_finetuning

    run_finetuning(folder, output, data, settings, resume=resume, overwrite=overwrite, device=device)
    logger.info("%s is complete; to score it: hf-linattn eval %s -o %s", output, output, output)


@app.command("eval")
def evaluate(
    folder: Folder,
    teacher: Annotated[str | None, typer.Option(help="The model before conversion, scored beside it.")] = None,
    tasks: Annotated[str | None, typer.Option(help="lm-eval tasks, comma separated; `none` for none.")] = None,
    task_data: TaskData = None,
    text: Text = None,
    limit: Annotated[int | None, typer.Option(help="Examples per task, for trying things out.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(help="Rows per forward pass; changes no figure.", min=1)] = 8,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for JSON, Markdown and plots; default: print only.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Keep what the output folder has scored already.")] = False,
    device: Device = None,
) -> None:
    """Score teacher, converted model and its window alone: tasks, perplexity by position, recall at a distance."""
    from hf_linattn.evals.run import DEFAULT_TASKS

    if resume and output is None:
        raise UserError("--resume: expected an output folder (-o) whose scores are kept, got none")
    names = DEFAULT_TASKS if tasks is None else [name for name in tasks.split(",") if name and name != "none"]
    _evaluate(
        folder,
        teacher,
        report=output,
        reuse=resume,
        tasks=names,
        task_data=task_data,
        text=text,
        limit=limit,
        batch_size=batch_size,
        device=device,
    )


@app.command()
def generate(
    folder: Folder,
    prompt: Annotated[str, typer.Argument(help="What to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Length of the continuation.", min=1)] = 100,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.", min=0)] = 0.0,
    chat: Annotated[bool, typer.Option("--chat", help="PROMPT is a message; use the chat template.")] = False,
    device: Device = None,
    seed: Seed = None,
) -> None:
    """Continue PROMPT with a converted model and print the text as it comes."""
    from transformers import TextStreamer, set_seed

    from hf_linattn.info import check_device
    from hf_linattn.loading import load_model

    model, tokenizer = load_model(folder, device=check_device(device))
    if seed is not None:
        set_seed(seed)
    text = prompt
    if chat:
        if not tokenizer.chat_template:
            raise UserError(f"--chat: {folder} has no chat template; leave --chat out")
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    # A chat template writes the special tokens itself.
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not chat).to(model.device)
    streamer = TextStreamer(tokenizer, skip_prompt=chat, skip_special_tokens=True)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    model.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer, **sampling)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Folder that `convert` or `finetune` wrote.")],
    repo: Annotated[str, typer.Argument(help="Repository on the Hub, owner/name.")],
    private: Annotated[bool, typer.Option("--private", help="Create the repository as private.")] = False,
) -> None:
    """Upload a converted model to the Hub: weights, tokenizer, code and the card with its measured numbers."""
    from huggingface_hub import HfApi

    from hf_linattn.info import model_facts

    if not folder.is_dir():
        raise UserError(f"FOLDER: expected a folder that `hf-linattn convert` wrote, got {folder}; no such folder")
    model_facts(folder)
    if not (folder / "README.md").is_file():
        raise UserError(f"FOLDER: {folder} has no model card (README.md); convert it again, or write one")
    # Not model.push_to_hub: it saves the model once more and writes a card of its own over ours.
    api = HfApi()
    repo_id = api.create_repo(repo, private=private, exist_ok=True).repo_id
    commit = api.upload_folder(folder_path=folder, repo_id=repo_id, commit_message="Upload from hf-linattn")
    typer.echo(f"pushed {folder} to {commit.repo_url}")


@app.command()
def bench(
    output: Annotated[Path | None, typer.Option("-o", "--output", help="JSON file to write.")] = None,
    device: Device = None,
) -> None:
    """Time the ops on this machine, next to PyTorch's softmax attention and, where installed, FLA."""
    from hf_linattn.evals.bench import run_bench
    from hf_linattn.info import check_device

    run_bench(device=check_device(device), output=output)


@app.command()
def info(
    folder: Annotated[
        str | None, typer.Argument(help="A converted model, folder or Hub id.", show_default=False)
    ] = None,
    device: Device = None,
) -> None:
    """Show versions, device, which op backend runs and why, and what a converted model keeps in memory."""
    from hf_linattn.info import check_device, environment_facts, model_facts

    facts = model_facts(folder) if folder else None
    lines = environment_facts(check_device(device), facts.dtype if facts else None)
    lines |= facts.lines() if facts else {}
    width = max(map(len, lines)) + 2
    for label, value in lines.items():
        typer.echo(f"{label:<{width}}{value}")


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe in full.", show_default=False)] = None,
) -> None:
    """List the recipes that ship with the package."""
    from hf_linattn.conversion.config import load_recipe, recipe_names

    if name:
        _print_settings(load_recipe(name), f"recipe {name}, defaults written out")
        return
    names = recipe_names()
    for known in names:
        typer.echo(f"{known:<{max(map(len, names)) + 2}}{load_recipe(known).description}")


def main() -> None:
    """Entry point of `hf-linattn`."""
    app()


def _pick_recipe(model: str | None, device: str | None) -> str:
    from hf_linattn.conversion.config import pick_recipe
    from hf_linattn.info import check_device, source_facts

    if model is None:
        raise UserError("MODEL: expected a model to convert, or --recipe with one that names its model, got neither")
    num_parameters, model_type = source_facts(model)
    name = pick_recipe(num_parameters, check_device(device).type, model_type)
    logger.info("recipe %s, for %s with %.0fM parameters", name, model, num_parameters / 1e6)
    return name


def _with_seed(overrides: list[str] | None, seed: int | None) -> list[str]:
    return [*(overrides or []), *([] if seed is None else [f"seed={seed}"])]


def _print_settings(config, title: str) -> None:
    import yaml

    typer.echo(f"# {title}\n{yaml.safe_dump(config.model_dump(mode='json'), sort_keys=False)}", nl=False)


def _check_evaluation_input(tasks, task_data: Path | None, text: Path | None) -> None:
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


def _evaluate(
    folder: str, teacher: str | None, *, report: Path | None, text: Path | None, device: str | None, **settings
):
    """Score `folder` and print the table; with `report`, write it there, and into a model card that is there."""
    from transformers import AutoTokenizer

    from hf_linattn.evals.report import print_results
    from hf_linattn.evals.run import RECALL_LENGTHS
    from hf_linattn.evals.run import evaluate as run_evaluation
    from hf_linattn.info import check_device, model_facts
    from hf_linattn.loading import load_model
    from hf_linattn.sample_text import write_sample_text

    facts = model_facts(folder)
    variants = ("teacher", "student", "window_only") if facts.attention["window"] else ("teacher", "student")
    text_length = min(settings.pop("text_length", TEXT_LENGTH), facts.max_positions)
    lengths = [n for n in settings.pop("recall_lengths", RECALL_LENGTHS) if n <= facts.max_positions]

    def progress(part: str, done: int, total: int) -> None:
        logger.info("evaluation: %d of %d, %s", done, total, part)

    with tempfile.TemporaryDirectory() as temporary:
        results = run_evaluation(
            lambda: load_model(folder, dtype=facts.dtype)[0],
            AutoTokenizer.from_pretrained(folder),
            teacher=None if teacher is None else lambda: load_model(teacher, dtype=facts.dtype)[0],
            variants=variants,
            text=text or write_sample_text(temporary, text_length),
            text_length=text_length,
            recall_lengths=lengths,
            device=check_device(device),
            command=shlex.join(["hf-linattn", *sys.argv[1:]]),
            output=None if report is None else report / f"{RESULTS_NAME}.json",
            progress=progress,
            **settings,
        )
    print_results(results)
    if report is not None:
        _write_report(report, results)


def _write_report(folder: Path, results: dict) -> None:
    import json

    from hf_linattn.conversion.model_card import write_model_card
    from hf_linattn.evals.report import results_table, write_report

    table, plot = write_report(results, folder, RESULTS_NAME)
    summary = folder / "conversion.json"
    if summary.is_file():
        values = json.loads(summary.read_text(encoding="utf-8"))
        write_model_card(folder, values, results, results_table(results), (plot.name,))
    logger.info("wrote %s, %s and %s", folder / f"{RESULTS_NAME}.json", table, plot)
