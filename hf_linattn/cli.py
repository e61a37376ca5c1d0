"""The command line: `hf-linattn COMMAND`, the same as `python -m hf_linattn COMMAND`.

Commands choose and redirect (model, recipe, data, output, device, resume); what a run does is in its recipe. This is
the only module that sees conversion and evals. It imports them, torch and transformers inside the commands, so that
`--help` stays quick. A failure that the user can mend ends as one message on stderr and exit code 1.
"""

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from hf_linattn.cli_errors import IS_MAIN_PROCESS, CommandGroup
from hf_linattn.cli_options import (
    Device,
    Folder,
    Model,
    Only,
    Output,
    Overrides,
    Overwrite,
    Resume,
    Seed,
    Shapes,
    Source,
    Suite,
    TaskData,
    Text,
    TrainingText,
    read_list,
    read_numbers,
    with_seed,
)
from hf_linattn.errors import UserError

logger = logging.getLogger(__name__)


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
    talks = IS_MAIN_PROCESS and not quiet
    logging.getLogger("hf_linattn").setLevel(logging.INFO if talks else logging.ERROR)
    if not debug:
        # Deprecations inside the libraries below are for us to mend, not for the user.
        warnings.filterwarnings("ignore", category=FutureWarning)
    if not (talks and sys.stderr.isatty()):
        _hide_progress_bars()


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

    config = load_recipe(recipe or _pick_recipe(model, device), with_seed(overrides, seed))
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
        from hf_linattn.cli_evaluation import check_evaluation_input

        check_evaluation_input(evaluation.tasks, task_data, text)

    from hf_linattn.conversion.pipeline import convert as run_conversion

    summary = run_conversion(model, output, config, data=data, resume=resume, overwrite=overwrite, device=device)
    if not IS_MAIN_PROCESS:
        return
    logger.info("%s is complete", output)
    if no_eval:
        return
    from hf_linattn.cli_evaluation import score

    logger.info("evaluating; to repeat it: hf-linattn eval %s --teacher %s -o %s", output, model, output)
    settings = {
        "tasks": evaluation.tasks,
        "task_data": task_data,
        "limit": evaluation.limit,
        "batch_size": evaluation.batch_size,
        "recall_lengths": evaluation.recall_lengths,
        "recall_trials": evaluation.recall_trials,
        "text_length": evaluation.perplexity_length,
        "conversion": {name: summary[name] for name in ("recipe", "tokens", "seconds", "peak_gib", "seed")},
        "reuse": resume,
    }
    score(str(output), model, settings, report=output, text=text, device=device)


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

    settings = load_finetune_config(config, with_seed(overrides, seed))
    if dry_run:
        _print_settings(settings, f"{folder} -> {output}" + (f", data {data}" if data else ""))
        return

    from hf_linattn.conversion.finetune import finetune as run_finetuning

    run_finetuning(folder, output, data, settings, resume=resume, overwrite=overwrite, device=device)
    logger.info("%s is complete; to score it: hf-linattn eval %s -o %s", output, output, output)


@app.command()
def ablate(
    model: Source,
    output: Annotated[Path, typer.Option("-o", "--output", help="JSON file of all figures.")],
    variants: Annotated[
        list[str] | None,
        typer.Option("--variant", metavar="'NAME A.B=C ...'", help="A name and its overrides; repeatable."),
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="Name (see `recipes`) or YAML file that all start from.")] = None,
    overrides: Overrides = None,
    data: TrainingText = None,
    text: Text = None,
    tasks: Annotated[str | None, typer.Option(help="lm-eval tasks, comma separated; default: none.")] = None,
    task_data: TaskData = None,
    device: Device = None,
    seed: Seed = None,
) -> None:
    """Train variants of a recipe one after the other and compare them; saves figures, not models."""
    from hf_linattn.cli_search import ablate as run_ablation
    from hf_linattn.cli_search import read_variants

    run_ablation(
        model,
        read_variants(variants or ()),
        output,
        recipe=recipe,
        overrides=with_seed(overrides, seed),
        data=data,
        text=text,
        tasks=read_list(tasks) if tasks else (),
        task_data=task_data,
        device=device,
    )


@app.command("select-layers")
def select_layers(
    model: Source,
    count: Annotated[int, typer.Option(help="How many layers to keep softmax.", min=1)],
    data: TrainingText = None,
    window: Annotated[int, typer.Option(help="Window of the other layers.", min=1)] = 64,
    rows: Annotated[int, typer.Option(help="Rows of text that layers are compared on.", min=1)] = 16,
    length: Annotated[int, typer.Option(help="Tokens of a row.", min=2)] = 2048,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="JSON file of the whole search.")] = None,
    device: Device = None,
    seed: Seed = None,
) -> None:
    """Find the layers of MODEL that should stay softmax, those that recall and perplexity miss most."""
    from hf_linattn.cli_search import select_layers as run_selection

    run_selection(model, count, data, window=window, rows=rows, length=length, output=output, device=device, seed=seed)


@app.command("eval")
def evaluate(
    folder: Folder,
    teacher: Annotated[str | None, typer.Option(help="The model before conversion, scored beside it.")] = None,
    tasks: Annotated[str | None, typer.Option(help="lm-eval tasks, comma separated; `none` for none.")] = None,
    task_data: TaskData = None,
    text: Text = None,
    recall_lengths: Annotated[
        str | None, typer.Option(help="Prompt lengths in tokens, comma separated; `none` skips recall.")
    ] = None,
    variants: Annotated[
        str | None, typer.Option(help="Which to score, of teacher,student,window_only; default: all there are.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Examples per task, for trying things out.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(help="Rows per forward pass; changes no figure.", min=1)] = 8,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for JSON, Markdown and plots; default: print only.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Keep what the output folder has scored already.")] = False,
    device: Device = None,
) -> None:
    """Score teacher, converted model and its window alone: tasks, perplexity by position, recall at a distance."""
    from hf_linattn.cli_evaluation import score
    from hf_linattn.evals.run import DEFAULT_TASKS, RECALL_LENGTHS

    if resume and output is None:
        raise UserError("--resume: expected an output folder (-o) whose scores are kept, got none")
    lengths = RECALL_LENGTHS if recall_lengths is None else read_numbers("--recall-lengths", recall_lengths)
    settings = {
        "tasks": DEFAULT_TASKS if tasks is None else read_list(tasks),
        "recall_lengths": lengths,
        "task_data": task_data,
        "limit": limit,
        "batch_size": batch_size,
        "reuse": resume,
    }
    if variants is not None:
        settings["variants"] = read_list(variants)
    score(folder, teacher, settings, report=output, text=text, device=device)


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

    # Said once at the first token, in the middle of the text; `info` tells as well.
    logging.getLogger("hf_linattn.kernels").setLevel(logging.WARNING)
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
    suite: Suite = "bars",
    model: Annotated[str | None, typer.Option(help="For the suite generation: a converted model.")] = None,
    backends: Annotated[
        list[str] | None, typer.Option("--backend", help="Only this implementation, e.g. ours; repeatable.")
    ] = None,
    skip: Annotated[
        list[str] | None, typer.Option(help="Leave out implementations that begin with this, e.g. fla; repeatable.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32; default by device.")] = None,
    shapes: Shapes = None,
    only: Only = None,
    runs: Annotated[int, typer.Option(help="Timed repetitions, of which the median counts.", min=1)] = 20,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="JSON file to write or to add the suite to; plots beside it.")
    ] = None,
    device: Device = None,
) -> None:
    """Measure the ops here, next to PyTorch's softmax attention and, where installed, FLA and mlstm_kernels."""
    from hf_linattn.cli_evaluation import measure_generation, measure_ops

    if suite == "generation":
        measure_generation(model, only or [], runs=runs, output=output, device=device)
        return
    if dtype not in (None, "bfloat16", "float16", "float32"):
        raise UserError(f"--dtype: expected bfloat16, float16 or float32, got {dtype!r}")
    sizes = [read_numbers("--shape", shape, 4) for shape in shapes or []]
    measure_ops(suite, sizes, backends=backends, skip=skip or (), dtype=dtype, runs=runs, output=output, device=device)


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


def _hide_progress_bars() -> None:
    """In a log file every update of a bar would be a line."""
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    if "transformers" in sys.modules:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()


def _pick_recipe(model: str | None, device: str | None) -> str:
    from hf_linattn.conversion.config import pick_recipe
    from hf_linattn.info import check_device, source_facts

    if model is None:
        raise UserError("MODEL: expected a model to convert, or --recipe with one that names its model, got neither")
    num_parameters, model_type = source_facts(model)
    name = pick_recipe(num_parameters, check_device(device).type, model_type)
    logger.info("recipe %s, for %s with %.0fM parameters", name, model, num_parameters / 1e6)
    return name


def _print_settings(config, title: str) -> None:
    import yaml

    typer.echo(f"# {title}\n{yaml.safe_dump(config.model_dump(mode='json'), sort_keys=False)}", nl=False)
