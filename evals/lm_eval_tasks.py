"""lm-eval's stock tasks on a loaded model, on the Hub's data or on local files.

The figures are those of `lm_eval --model hf --model_args pretrained=FOLDER,trust_remote_code=True`: the same HFLM, the
same task objects, the defaults of its command line.

Batch size and figures. HFLM sorts requests by length, pads a batch on the right with token 0 and passes no attention
mask; a causal model cannot see that padding, the answers are cut off before it, and identical contexts are grouped
before batches are formed. Mathematically a figure is therefore the same for every batch size, and in fp32 it is equal
up to the last digits. In bf16 and fp16 a matrix product may round differently for another batch shape, which can turn
an answer whose two best choices tie. A model whose rotary embedding depends on the length of the padded input
("dynamic" and "longrope" scaling past the original length) really differs; score such a model with batch size 1.
Rolling tasks (wikitext) fill windows of the model's whole length, so their batch is capped by `ROLLING_TOKENS`.
"""

import array
import contextlib
import copy
import functools
import logging
import os
import random
import tempfile
from collections.abc import Iterator, MutableMapping, Sequence
from pathlib import Path
from typing import NamedTuple

import datasets
import lm_eval
import lm_eval.utils
import numpy as np
import torch
from lm_eval.api.task import Task
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_linattn.errors import UserError
from hf_linattn.evals.task_data import (
    LocalTask,
    fewshot_count,
    leaf_tasks,
    no_download_counts,
    stock_tasks,
    write_local_tasks,
)

ROLLING_TOKENS = 16384
"""Tokens of one batch of a rolling task: their logits, `[tokens, vocab]`, exist at once."""
BOOTSTRAP_ITERS = 1000
"""Resamples for the standard error of a perplexity; lm-eval's default of 100,000 takes longer than the task."""
NO_POOL = "DISABLE_MULTIPROC"
"""lm-eval's environment variable against a pool of processes for the resampling."""
FEWSHOT_SEED = 1234
"""lm-eval's own seed for the choice of few-shot examples."""
MAX_ENCODINGS = 200_000
"""Strings whose tokens are remembered: those of hellaswag are 50,000, in 50 MB."""

Encodings = MutableMapping[tuple, array.array]
"""(string, options of `encode`) -> tokens."""


class TaskScores(NamedTuple):
    """`metrics[task]`: metric -> value, `<metric>_stderr` -> value, and `n`; `splits[task]`: where its rows came from.

    A group contributes its aggregate under its own name; a tag, or a group without aggregate, its single tasks.
    `splits` is empty on the Hub's data.
    """

    metrics: dict[str, dict[str, float]]
    splits: dict[str, LocalTask]


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    task_data: str | Path | None = None,
    batch_size: int = 8,
    num_fewshot: int | None = None,
    limit: int | None = None,
    encodings: Encodings | None = None,
) -> TaskScores:
    """Scores a model on stock lm-eval tasks.

    Args:
        model (`PreTrainedModel`): causal language model, on its device.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer; left as it is.
        tasks (`Sequence[str]`): lm-eval tasks, groups or tags.
        task_data (`str` or `Path`, *optional*): folder of <task>/<split>.parquet (see `task_data`); with it nothing is
            asked of the Hub. None downloads the stock data sets.
        batch_size (`int`, defaults to 8): rows per forward pass.
        num_fewshot (`int`, *optional*): examples before each question; None keeps each task's own default.
        limit (`int`, *optional*): documents per task, for trying things out; such figures are not comparable.
        encodings (`dict`, *optional*): filled with the tokens of every string; given again, for another model with the
            same tokenizer, it saves as much time as a small model's answers take.

    Returns:
        `TaskScores`.

    Raises:
        UserError: unknown task, its data is missing from `task_data` or out of reach on the Hub, or the split that
            `num_fewshot` examples come from has no file.
    """
    for name in tasks:
        leaf_tasks(name)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_own_surroundings(model.device))
        stack.enter_context(_without_cache(model))
        manager, splits = stock_tasks(), {}
        if task_data is not None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="hf-linattn-tasks-"))
            splits = write_local_tasks(task_data, tasks, folder, num_fewshot=num_fewshot)
            manager = TaskManager(include_path=folder, include_defaults=False)
            stack.enter_context(no_download_counts())
        try:
            loaded = manager.load(list(tasks))
        except ConnectionError as error:
            raise UserError(
                f"tasks: expected the data of {', '.join(tasks)} from the Hub, got: {error}; connect to it, "
                "or keep the files in a folder and give it as task_data"
            ) from error
        rolling = any(task.OUTPUT_TYPE == "loglikelihood_rolling" for task in loaded["tasks"].values())
        # HFLM gives a tokenizer without pad token one.
        own_tokenizer = copy.deepcopy(tokenizer)
        _remember_encodings(own_tokenizer, {} if encodings is None else encodings)
        lm = HFLM(pretrained=model, tokenizer=own_tokenizer, batch_size=batch_size)
        if rolling:
            lm.batch_size_per_gpu = max(1, min(batch_size, ROLLING_TOKENS // lm.max_length))
        for task in loaded["tasks"].values():
            _set_fewshot(task, num_fewshot)
        # `simple_evaluate` does the same and then spends seconds of every call on listing installed packages.
        output = lm_eval.evaluate(
            lm, task_dict=loaded, limit=limit, bootstrap_iters=BOOTSTRAP_ITERS, log_samples=False
        )
    return TaskScores(_plain_metrics(output, tasks), splits)


@contextlib.contextmanager
def _without_cache(model: PreTrainedModel) -> Iterator[None]:
    """Within: a forward makes no cache unless asked to, as `generate` does. HFLM does not ask, and scores whole rows:
    filling the rings of wide windows took a converted model longer than the rows."""
    config = model.config.get_text_config()
    was = config.use_cache
    config.use_cache = False
    try:
        yield
    finally:
        config.use_cache = was


def _remember_encodings(tokenizer: PreTrainedTokenizerBase, encodings: Encodings) -> None:
    """HFLM encodes a question anew for each of its answers, one string a call."""
    encode = tokenizer.encode

    def remembering_encode(text: str, **options) -> list[int]:
        key = (text, *sorted(options.items()))
        tokens = encodings.get(key)
        if tokens is None:
            tokens = array.array("i", encode(text, **options))
            if len(encodings) < MAX_ENCODINGS:
                encodings[key] = tokens
        return tokens.tolist()

    tokenizer.encode = remembering_encode


def _set_fewshot(task: Task, num_fewshot: int | None) -> None:
    task.set_config(key="num_fewshot", value=fewshot_count(task.get_config("num_fewshot"), num_fewshot))
    task.set_fewshot_seed(seed=FEWSHOT_SEED)


def _plain_metrics(output: dict, tasks: Sequence[str]) -> dict[str, dict[str, float]]:
    """`"acc,none": np.float64(...)` -> `"acc": float`; a standard error that lm-eval gives as "N/A" is left out."""
    metrics = {}
    for name in tasks:
        has_own = any("," in key for key in output["results"].get(name, {}))
        for scored in [name] if has_own else leaf_tasks(name):
            result = output["results"][scored]
            values = {key.partition(",")[0]: value for key, value in result.items() if "," in key}
            metrics[scored] = {key: float(value) for key, value in values.items() if not isinstance(value, str)}
            metrics[scored]["n"] = float(result["sample_len"])
    return metrics


@contextlib.contextmanager
def _own_surroundings(device: torch.device) -> Iterator[None]:
    """lm-eval's seeds, its log at errors only, no bar for reading files, templates compiled once; all as before
    afterwards."""
    logger = logging.getLogger("lm_eval")
    level, python_state, numpy_state = logger.level, random.getstate(), np.random.get_state()
    bars_were_on = not datasets.are_progress_bars_disabled()
    multiprocessing_was = os.environ.get(NO_POOL)
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    # lm-eval would fork a process that holds a CUDA context and threads, for work of one second.
    os.environ[NO_POOL] = "1"
    # lm-eval compiles a task's templates anew for every document, which takes longer than a small model's answers.
    templates = lm_eval.utils.env
    templates.from_string = functools.lru_cache(maxsize=1024)(templates.from_string)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            random.seed(0)
            np.random.seed(FEWSHOT_SEED)
            torch.manual_seed(FEWSHOT_SEED)
            yield
    finally:
        del templates.from_string  # the class's method is in sight again
        logger.setLevel(level)
        if bars_were_on:
            datasets.enable_progress_bars()
        if multiprocessing_was is None:
            del os.environ[NO_POOL]
        else:
            os.environ[NO_POOL] = multiprocessing_was
        random.setstate(python_state)
        np.random.set_state(numpy_state)
