"""lm-eval's stock tasks on local files: the task is the stock one, its dataset is replaced and nothing else.

`write_local_tasks` writes one small YAML per task that includes the stock YAML by path and overrides its dataset:

    include: .../lm_eval/tasks/piqa/piqa.yaml
    dataset_path: parquet
    dataset_name: null
    dataset_kwargs: {data_files: {validation: DIR/piqa/validation.parquet}, ...}
    training_split: null                    # DIR/piqa/train.parquet does not exist

so prompts, metrics and few-shot rules stay lm-eval's, and the folder also serves the stock command line
(`lm_eval --include_path FOLDER --tasks piqa`). Files are DIR/<task>/<split>.parquet in the columns of the task's own
data set; the subjects of a group such as mmlu share DIR/<group>/<split>.parquet and are told apart by `subject`.

A split without a file does not exist for the task. lm-eval then scores what it always scores: the test split where
there is one, else validation. `LocalTask.split` records which one that is, `LocalTask.stock_split` which one it would
have been on the Hub (sciq on a folder with validation.parquet only: "validation" instead of "test").
"""

import contextlib
import difflib
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from lm_eval.tasks import TaskManager

from hf_linattn.errors import UserError

SPLIT_KEYS = ("fewshot_split", "training_split", "validation_split", "test_split")
"""lm-eval's keys that name a split, in the order in which it looks for few-shot examples."""
SUBJECT_COLUMN = "subject"


class LocalTask(NamedTuple):
    """Where the rows of one stock task come from: the split scored here and the one the stock task scores."""

    split: str
    stock_split: str


@functools.cache
def stock_tasks() -> TaskManager:
    """lm-eval's index of its own tasks, read once per process (it parses some ten thousand files)."""
    return TaskManager()


def leaf_tasks(name: str) -> list[str]:
    """The single tasks behind a task, group or tag of lm-eval, in lm-eval's order.

    Raises:
        UserError: lm-eval has nothing of this name; names the nearest ones.
    """
    index = stock_tasks().task_index
    if name not in index:
        near = difflib.get_close_matches(name, index, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "`lm_eval ls tasks` lists the names"
        raise UserError(f"tasks: expected the name of an lm-eval task, group or tag, got {name!r}; {hint}")
    if name in stock_tasks().all_subtasks:
        return [name]
    return [leaf for child in _children(name) for leaf in leaf_tasks(child)]


def fewshot_count(own: int | None, asked: int | None) -> int:
    """lm-eval's rule: a task that says 0 stays at 0, one that says nothing starts from 0, else `asked` counts."""
    return own or 0 if asked is None or own == 0 else asked


def write_local_tasks(
    task_data: str | Path, tasks: Sequence[str], folder: str | Path, *, num_fewshot: int | None = None
) -> dict[str, LocalTask]:
    """Writes the YAML files that put `tasks` on local data; a `TaskManager(include_path=folder)` reads them.

    Args:
        task_data (`str` or `Path`): folder holding <task>/<split>.parquet.
        tasks (`Sequence[str]`): names of lm-eval tasks, groups or tags.
        folder (`str` or `Path`): existing folder to write to; data sets are cached in it as well.
        num_fewshot (`int`, *optional*): examples that will be put before each question; their split must exist.

    Returns:
        `dict[str, LocalTask]`: for each single task, which split is scored and which the stock task scores.

    Raises:
        UserError: unknown task; no folder or no split file for it; a shared file without `subject` column or
            without rows of the subject; no file for the split that few-shot examples come from.
    """
    task_data, folder = Path(task_data).expanduser().resolve(), Path(folder).resolve()
    if not task_data.is_dir():
        raise UserError(f"task_data: expected a folder of <task>/<split>.parquet, got {task_data}; no such folder")
    written = {}
    for name in tasks:
        for leaf in leaf_tasks(name):
            written[leaf] = _write_task(task_data, leaf, folder, num_fewshot)
        for group in _groups(name):
            _write_yaml(folder, group, {"include": str(stock_tasks().task_index[group].yaml_path)})
    return written


@contextlib.contextmanager
def no_download_counts() -> Iterator[None]:
    """Stops `datasets` from reporting over the network that it reads a parquet file."""
    before = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        yield
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = before


def _write_task(task_data: Path, task: str, folder: Path, num_fewshot: int | None) -> LocalTask:
    entry = stock_tasks().task_index[task]
    source = _data_folder(task_data, task)
    subject = None if source.name == task else entry.cfg["dataset_name"]
    files = {path.stem: path for path in sorted(source.glob("*.parquet"))}
    stock = {key: entry.cfg.get(key) for key in SPLIT_KEYS}
    present = {key: split if split in files else None for key, split in stock.items()}
    scored = [stock["test_split"], stock["validation_split"]]
    split = next((split for split in scored if split in files), None)
    wanted = [split for split in scored if split]
    if split is None:
        expected = " or ".join(f"{source / name}.parquet" for name in wanted)
        raise UserError(f"task_data: expected {expected} for task {task}, found {sorted(files) or 'no parquet file'}")
    examples = _fewshot_split(entry.cfg)
    if fewshot_count(entry.cfg.get("num_fewshot"), num_fewshot) and examples not in (None, *files):
        raise UserError(
            f"num_fewshot: {task} takes its examples from the split {examples}, expected {source / examples}.parquet; "
            "add it or evaluate without examples"
        )
    used = {name: path for name, path in files.items() if name in stock.values()}
    kwargs = {"data_files": {name: str(path) for name, path in used.items()}, "cache_dir": str(folder / "cache")}
    for path in used.values():
        _check_rows(path, subject, task)
    if subject is not None:
        kwargs["filters"] = [[SUBJECT_COLUMN, "==", subject]]
    missing = {key: None for key, split in present.items() if split != stock[key]}
    dataset = {"dataset_path": "parquet", "dataset_name": None, "dataset_kwargs": kwargs}
    _write_yaml(folder, task, {"include": str(entry.yaml_path), **dataset, **missing})
    return LocalTask(split, wanted[0])


def _fewshot_split(config: dict) -> str | None:
    """The split lm-eval draws examples from; None where the task brings its own."""
    fewshot = config.get("fewshot_config") or {}
    if "samples" in fewshot:
        return None
    named = (fewshot.get("split"), *(config.get(key) for key in SPLIT_KEYS))
    return next(split for split in named if split)


def _data_folder(task_data: Path, task: str) -> Path:
    """DIR/<task>, else DIR/<group> of the longest group whose name opens the task's (mmlu for mmlu_anatomy)."""
    words = task.split("_")
    opening = ["_".join(words[:count]) for count in range(len(words) - 1, 0, -1)]
    candidates = [task, *(name for name in opening if name in stock_tasks().all_groups)]
    for name in candidates:
        if (task_data / name).is_dir():
            return task_data / name
    there = ", ".join(sorted(path.name for path in task_data.iterdir() if path.is_dir())) or "no folder"
    expected = " or ".join(str(task_data / name) for name in candidates)
    raise UserError(
        f"task_data: expected the folder {expected} for task {task}, found {there}; add it or drop the task"
    )


def _check_rows(path: Path, subject: str | None, task: str) -> None:
    """The file is parquet and has rows, of the task's own subject where it serves a group."""
    try:
        columns = pq.read_schema(path).names
    except pa.ArrowInvalid as error:
        raise UserError(f"task_data: expected a readable parquet file, got {path}: {error}; write it again") from error
    if subject is None:
        if not pq.read_metadata(path).num_rows:
            raise UserError(f"task_data: expected rows in {path} for {task}, got none; add them or drop the task")
        return
    if SUBJECT_COLUMN not in columns:
        raise UserError(
            f"task_data: expected a column {SUBJECT_COLUMN!r} in {path}, which serves {task} among others, "
            f"got {columns}; add it or give the task a folder of its own, {path.parent.parent / task}"
        )
    if not pq.read_table(path, columns=[SUBJECT_COLUMN], filters=[(SUBJECT_COLUMN, "==", subject)]).num_rows:
        raise UserError(
            f"task_data: expected rows with {SUBJECT_COLUMN} {subject!r} in {path} for {task}, got none; "
            "add them or drop the task"
        )


def _children(name: str) -> list[str]:
    entry = stock_tasks().task_index[name]
    if name not in stock_tasks().all_groups:
        return sorted(entry.tags)
    members = entry.cfg["task"]
    members = members if isinstance(members, list) else [members]
    return [member if isinstance(member, str) else member.get("group") or member["task"] for member in members]


def _groups(name: str) -> list[str]:
    if name not in stock_tasks().all_groups:
        return []
    return [name, *(group for child in _children(name) for group in _groups(child))]


def _write_yaml(folder: Path, name: str, content: dict) -> None:
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
