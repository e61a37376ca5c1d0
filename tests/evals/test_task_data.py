"""lm-eval's stock tasks on local files: prompts, splits, what is overridden, offline, and every refusal."""

import shutil
import socket

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from lm_eval.tasks import TaskManager

from hf_linattn.errors import UserError
from hf_linattn.evals.task_data import LocalTask, leaf_tasks, no_download_counts, stock_tasks, write_local_tasks

DATASET_KEYS = {"dataset_path", "dataset_name", "dataset_kwargs"}
SPLIT_KEYS = {"test_split", "validation_split", "training_split", "fewshot_split"}
TASKS = ["piqa", "hellaswag", "arc_easy", "sciq", "lambada_openai", "wikitext", "mmlu_social_sciences"]


@pytest.fixture(scope="module")
def local(task_data, tmp_path_factory):
    """(splits by task, task manager, loaded tasks)"""
    folder = tmp_path_factory.mktemp("yaml")
    splits = write_local_tasks(task_data, TASKS, folder)
    manager = TaskManager(include_path=folder, include_defaults=False)
    return splits, manager, manager.load(TASKS)


@pytest.mark.parametrize(
    ("task", "text", "choices", "target"),
    [
        (
            "piqa",
            "Question: What do plants need to grow\nAnswer:",
            ["sunlight", "a hat"],
            0,
        ),
        (
            "hellaswag",
            "Playing chess: the dog ran over the hill and came back to the house with the dog Then the cat",
            ["sunlight", "a hat", "loud music", "money"],
            0,
        ),
        (
            "arc_easy",
            "Question: What do plants need to grow?\nAnswer:",
            ["sunlight", "a hat", "loud music", "money"],
            0,
        ),
        (
            "sciq",
            "\nQuestion: What do plants need to grow\nAnswer:",
            ["a hat", "loud music", "money", "sunlight"],
            3,
        ),
        (
            "lambada_openai",
            "the dog ran over the hill and came back to the house with the",
            None,
            " dog",
        ),
        (
            "mmlu_econometrics",
            "What do plants need to grow (econometrics)?\nA. sunlight\nB. a hat\nC. loud music\nD. money\nAnswer:",
            ["A", "B", "C", "D"],
            0,
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and "\n" not in value and " " not in value else "",
)
def test_documents_give_the_stock_prompts(local, task, text, choices, target):
    task = local[2]["tasks"][task]
    document = task.eval_docs[0]
    assert task.doc_to_text(document) == text
    assert task.doc_to_target(document) == target
    if choices is not None:
        assert task.doc_to_choice(document) == choices


def test_wikitext_pages_are_detokenised(local):
    task = local[2]["tasks"]["wikitext"]
    target = task.doc_to_target(task.eval_docs[0])
    assert target.startswith(" = Page 0 =\n\nthe dog ran")
    assert "the dog. he opened" in target  # "the dog . he opened" in the raw page


def test_only_the_dataset_is_replaced(local):
    splits, manager, _ = local
    for task in splits:
        ours, stock = manager.task_index[task].cfg, stock_tasks().task_index[task].cfg
        changed = {key for key in ours.keys() | stock.keys() if ours.get(key) != stock.get(key)}
        assert changed <= DATASET_KEYS | SPLIT_KEYS, task
        for key in changed & SPLIT_KEYS:
            assert ours[key] is None, (task, key)


def test_a_group_keeps_its_subjects_apart(local):
    splits, _, loaded = local
    subjects = leaf_tasks("mmlu_social_sciences")
    assert set(subjects) <= set(splits)
    for name in subjects:
        task = loaded["tasks"][name]
        assert set(task.eval_docs["subject"]) == {task.config.task.removeprefix("mmlu_")}
        assert len(task.eval_docs) == 2
    assert loaded["groups"].keys() == {"mmlu_social_sciences"}


def test_the_whole_of_mmlu_is_57_tasks():
    assert len(leaf_tasks("mmlu")) == 57
    assert leaf_tasks("ai2_arc") == ["arc_challenge", "arc_easy"]


def test_missing_test_split_falls_back_to_validation(local):
    splits, _, loaded = local
    assert splits["sciq"] == LocalTask(split="validation", stock_split="test")
    assert len(loaded["tasks"]["sciq"].eval_docs) == 5
    assert splits["arc_easy"] == LocalTask(split="test", stock_split="test")
    assert len(loaded["tasks"]["arc_easy"].eval_docs) == 5  # test, not the two rows of validation
    assert splits["piqa"] == LocalTask(split="validation", stock_split="validation")


def test_nothing_is_asked_of_the_network(task_data, tmp_path, monkeypatch):
    calls = []

    def refuse(*args, **kwargs):
        calls.append(args)
        raise OSError("no network in this test")

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", True)
    monkeypatch.setattr(datasets.load, "get_session", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    write_local_tasks(task_data, ["piqa", "lambada_openai"], tmp_path)
    manager = TaskManager(include_path=tmp_path, include_defaults=False)
    with no_download_counts():
        manager.load(["piqa"])
    assert not calls
    # The report is what `no_download_counts` stops: without it the same load does try the network.
    manager.load(["lambada_openai"])
    assert calls


def test_the_data_set_cache_stays_in_the_folder(task_data, tmp_path):
    write_local_tasks(task_data, ["piqa"], tmp_path)
    assert yaml.safe_load((tmp_path / "piqa.yaml").read_text())["dataset_kwargs"]["cache_dir"].startswith(
        str(tmp_path)
    )


def copy_of(task_data, tmp_path, *names):
    for name in names:
        shutil.copytree(task_data / name, tmp_path / "data" / name)
    return tmp_path / "data"


def test_unknown_task_names_the_nearest():
    with pytest.raises(UserError, match="got 'hellaswg'; did you mean hellaswag"):
        leaf_tasks("hellaswg")


def test_no_such_data_folder(tmp_path):
    with pytest.raises(UserError, match=r"task_data: expected a folder .*no such folder"):
        write_local_tasks(tmp_path / "absent", ["piqa"], tmp_path)


def test_no_folder_for_the_task(task_data, tmp_path):
    data = copy_of(task_data, tmp_path, "arc_easy")
    with pytest.raises(UserError, match=r"expected the folder .*data/piqa for task piqa, found arc_easy"):
        write_local_tasks(data, ["piqa"], tmp_path)


def test_no_file_of_a_split_that_is_scored(task_data, tmp_path):
    data = copy_of(task_data, tmp_path, "sciq")
    (data / "sciq/validation.parquet").rename(data / "sciq/train.parquet")
    expected = r"expected .*sciq/test.parquet or .*sciq/validation.parquet for task sciq, found \['train'\]"
    with pytest.raises(UserError, match=expected):
        write_local_tasks(data, ["sciq"], tmp_path)


def test_shared_file_without_subject_column(task_data, tmp_path):
    data = copy_of(task_data, tmp_path, "mmlu")
    path = data / "mmlu/test.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["subject"]), path)
    with pytest.raises(UserError, match=r"expected a column 'subject' in .*test.parquet"):
        write_local_tasks(data, ["mmlu_econometrics"], tmp_path)


def test_shared_file_without_rows_of_a_subject(task_data, tmp_path):
    with pytest.raises(UserError, match=r"expected rows with subject 'anatomy' .* for mmlu_anatomy, got none"):
        write_local_tasks(task_data, ["mmlu_anatomy"], tmp_path)


def test_a_file_that_is_no_parquet(task_data, tmp_path):
    data = copy_of(task_data, tmp_path, "piqa")
    (data / "piqa/validation.parquet").write_bytes(b"PAR1 broken off")
    with pytest.raises(UserError, match=r"expected a readable parquet file, got .*piqa/validation.parquet"):
        write_local_tasks(data, ["piqa"], tmp_path)


def test_a_file_without_rows(task_data, tmp_path):
    data = copy_of(task_data, tmp_path, "piqa")
    path = data / "piqa/validation.parquet"
    pq.write_table(pa.Table.from_pylist([], schema=pq.read_schema(path)), path)
    with pytest.raises(UserError, match=r"expected rows in .*piqa/validation.parquet for piqa, got none"):
        write_local_tasks(data, ["piqa"], tmp_path)
