"""One evaluation: every variant on tasks, perplexity by position and recall, into one results dictionary.

    check the input -> teacher: tasks, perplexity, recall -> free it -> student: the same -> window_only: the same

A part is one task, one perplexity curve or one recall curve of one variant. The results file is rewritten after each;
with `reuse=True` parts already in it are not run again, and a model none of whose parts is missing is never loaded.
"""

import datetime
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_linattn.errors import UserError
from hf_linattn.evals.controls import VARIANTS, LazyModel, ModelLoader, as_variant, check_variants
from hf_linattn.evals.lm_eval_tasks import Encodings, run_tasks
from hf_linattn.evals.perplexity import long_texts, perplexity_by_position
from hf_linattn.evals.recall import mqar, passkey
from hf_linattn.evals.results_file import check_same_settings, checkout_commit, read_results, write_results
from hf_linattn.evals.scoring import check_length
from hf_linattn.evals.task_data import leaf_tasks, write_local_tasks
from hf_linattn.evals.text_files import read_documents

DEFAULT_TASKS = ("hellaswag", "piqa", "arc_easy", "lambada_openai", "wikitext")
RECALL_LENGTHS = (128, 256, 512, 1024, 2048, 4096)
PPL = "ppl_by_position"
RECALL = {"passkey": passkey, "mqar": mqar}
CONVERSION_FACTS = ("recipe", "tokens", "seconds", "peak_gib", "seed")

Progress = Callable[[str, int, int], None]


def evaluate(
    student: PreTrainedModel | ModelLoader,
    tokenizer: PreTrainedTokenizerBase,
    *,
    teacher: PreTrainedModel | ModelLoader | None = None,
    variants: Sequence[str] = VARIANTS,
    tasks: Sequence[str] = DEFAULT_TASKS,
    task_data: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    text: str | Path | None = None,
    text_source: str | None = None,
    text_length: int = 8192,
    text_documents: int | None = 16,
    recall_lengths: Sequence[int] = RECALL_LENGTHS,
    recall_trials: int = 40,
    seed: int = 0,
    batch_size: int = 8,
    device: str | torch.device | None = None,
    conversion: Mapping[str, object] | None = None,
    command: str | None = None,
    output: str | Path | None = None,
    reuse: bool = False,
    progress: Progress | None = None,
) -> dict:
    """Scores teacher, student and the window-only control on everything asked for.

    Args:
        student (`PreTrainedModel` or function that loads it): the converted model.
        tokenizer (`PreTrainedTokenizerBase`): the tokenizer of both models.
        teacher (`PreTrainedModel` or function that loads it, *optional*): the model before conversion. Given as
            functions, the two models are never in memory together.
        variants (`Sequence[str]`): which of teacher, student, window_only to score.
        tasks (`Sequence[str]`): lm-eval tasks, groups or tags; empty for none.
        task_data (`str` or `Path`, *optional*): folder of <task>/<split>.parquet; None takes the Hub's data.
        num_fewshot (`int`, *optional*): examples before each question; None keeps each task's default.
        limit (`int`, *optional*): documents per task, for trying things out.
        text (`str` or `Path`, *optional*): file of long documents for perplexity by position; None skips it.
        text_source (`str`, *optional*): only rows with this value in the file's column `source`.
        text_length (`int`, defaults to 8192): tokens read of each document; shorter documents do not count.
        text_documents (`int`, *optional*, defaults to 16): number of documents, None for all.
        recall_lengths (`Sequence[int]`): prompt lengths in tokens for passkey and associative recall; empty for none.
        recall_trials (`int`, defaults to 40): prompts per length.
        seed (`int`, defaults to 0): of the recall prompts.
        batch_size (`int`, defaults to 8): rows per forward pass.
        device (`str` or `torch.device`, *optional*): where the models run; None leaves them where they are.
        conversion (`Mapping`, *optional*): facts of the run that made the student: recipe, tokens, seconds, peak_gib,
            seed. Absent ones become null.
        command (`str`, *optional*): the command that repeats this evaluation, for the record.
        output (`str` or `Path`, *optional*): JSON file, rewritten after every part.
        reuse (`bool`, defaults to `False`): keep the parts already in `output`.
        progress (`Callable[[str, int, int], None]`, *optional*): called with (part, parts done, parts in all) before
            each part and once at the end.

    Returns:
        `dict`: the content of the results file, see `results_file`.

    Raises:
        UserError: unknown task, variant or conversion fact; missing data; text too short; a length beyond the model's
            positions; `reuse` of a file scored with other settings. Input is checked before anything is scored.
    """
    request = _Request(
        tasks=tuple(tasks),
        task_data=task_data,
        num_fewshot=num_fewshot,
        limit=limit,
        documents=None if text is None else read_documents(text, source=text_source),
        text_length=text_length,
        text_documents=text_documents,
        recall_lengths=tuple(recall_lengths),
        recall_trials=recall_trials,
        seed=seed,
        batch_size=batch_size,
        tokenizer=tokenizer,
    )
    settings = request.settings() | {"text": None if text is None else Path(text).name, "text_source": text_source}
    parts = request.parts(check_variants(variants, teacher is not None))
    results = _start(output, reuse, settings, conversion)
    results["command"] = command
    results["evaluation"]["splits"] |= request.check_tasks()
    request.check_text()
    missing = [part for part in parts if part.key not in results["evaluation"]["part_seconds"]]
    models = {"teacher": LazyModel(teacher, device), "student": LazyModel(student, device)}
    for index, part in enumerate(missing):
        if progress is not None:
            progress(part.key, len(parts) - len(missing) + index, len(parts))
        if part.variant != "teacher":
            models["teacher"].release()
        request.run(part, models["teacher" if part.variant == "teacher" else "student"].get(), results)
        if output is not None:
            write_results(output, results)
    for model in models.values():
        model.release()
    if progress is not None:
        progress("done", len(parts), len(parts))
    return results


class _Part(NamedTuple):
    variant: str
    name: str

    @property
    def key(self) -> str:
        return f"{self.variant}/{self.name}"


@dataclass(frozen=True, kw_only=True)
class _Request:
    """What is to be scored, the same for every variant."""

    tasks: tuple[str, ...]
    task_data: str | Path | None
    num_fewshot: int | None
    limit: int | None
    documents: list[str] | None
    text_length: int
    text_documents: int | None
    recall_lengths: tuple[int, ...]
    recall_trials: int
    seed: int
    batch_size: int
    tokenizer: PreTrainedTokenizerBase
    encodings: Encodings = field(default_factory=dict)

    def settings(self) -> dict:
        """All that changes a figure, as JSON gives it back; compared when a file is reused."""
        names = ("num_fewshot", "limit", "text_length", "text_documents", "recall_trials", "seed")
        settings = {name: getattr(self, name) for name in names}
        return settings | {"recall_lengths": list(self.recall_lengths), "local_data": self.task_data is not None}

    def parts(self, variants: list[str]) -> list[_Part]:
        # The quick ones first, and those that tell most.
        names = [PPL] if self.documents is not None else []
        names += list(RECALL) if self.recall_lengths else []
        names += self.tasks
        return [_Part(variant, name) for variant in variants for name in names]

    def check_tasks(self) -> dict[str, dict[str, str]]:
        """Every task exists and has its data; returns for local data which split is scored."""
        if self.task_data is None:
            for task in self.tasks:
                leaf_tasks(task)
            return {}
        with tempfile.TemporaryDirectory() as folder:
            written = write_local_tasks(self.task_data, self.tasks, folder, num_fewshot=self.num_fewshot)
        return {task: local._asdict() for task, local in written.items()}

    def check_text(self) -> None:
        """The documents are long enough for this tokenizer."""
        if self.documents is not None:
            long_texts(self.tokenizer, self.documents, self.text_length, self.text_documents)

    def run(self, part: _Part, model: PreTrainedModel, results: dict) -> None:
        """Scores one part, puts it in its place in `results` and notes what it may depend on besides the settings."""
        started = time.perf_counter()
        if self.documents is not None:
            check_length(model, self.text_length, "text_length")
        if self.recall_lengths:
            check_length(model, max(self.recall_lengths), "recall_lengths")
        with as_variant(model, part.variant):
            self._score(part, model, results)
        evaluation, device = results["evaluation"], model.device
        evaluation["part_seconds"][part.key] = round(time.perf_counter() - started, 3)
        evaluation.setdefault("dtype", {})[part.variant] = str(model.dtype).removeprefix("torch.")
        evaluation["batch_size"] = self.batch_size
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        results["environment"]["device"] = name

    def _score(self, part: _Part, model: PreTrainedModel, results: dict) -> None:
        if part.name == PPL:
            results[PPL][part.variant] = perplexity_by_position(
                model,
                self.tokenizer,
                self.documents,
                max_length=self.text_length,
                max_documents=self.text_documents,
            )
        elif part.name in RECALL:
            curve = RECALL[part.name](
                model,
                self.tokenizer,
                self.recall_lengths,
                trials=self.recall_trials,
                batch_size=self.batch_size,
                seed=self.seed,
            )
            curves = results["recall"].setdefault(part.variant, {})
            curves[part.name] = {str(length): share for length, share in curve.items()}
        else:
            scores = run_tasks(
                model,
                self.tokenizer,
                [part.name],
                task_data=self.task_data,
                batch_size=self.batch_size,
                num_fewshot=self.num_fewshot,
                limit=self.limit,
                encodings=self.encodings,
            )
            results[part.variant].update(scores.metrics)


def _start(output: str | Path | None, reuse: bool, settings: dict, conversion: Mapping[str, object] | None) -> dict:
    """The results so far: those in `output` when they are reused, else an empty frame."""
    facts = dict(conversion or {})
    for name in facts:
        if name not in CONVERSION_FACTS:
            raise UserError(f"conversion: expected facts among {', '.join(CONVERSION_FACTS)}, got {name!r}")
    if reuse and output is not None and Path(output).exists():
        results = read_results(output)
        check_same_settings(output, results["evaluation"]["settings"], settings)
        return results | facts
    return {
        "recipe": facts.get("recipe"),
        "commit": checkout_commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "tokens": facts.get("tokens"),
        "seconds": facts.get("seconds"),
        "peak_gib": facts.get("peak_gib"),
        "seed": facts.get("seed"),
        **{variant: {} for variant in VARIANTS},
        PPL: {},
        "recall": {},
        "command": None,
        "evaluation": {"settings": settings, "part_seconds": {}, "splits": {}},
        "environment": {name: version(name) for name in ("torch", "transformers", "lm_eval")},
    }
