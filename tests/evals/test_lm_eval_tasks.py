"""Figures of stock tasks: the same as lm-eval's own, for every batch size, on a converted model."""

import random

import datasets
import lm_eval
import lm_eval.utils
import numpy as np
import pytest
import torch
from lm_eval.tasks import TaskManager

from hf_linattn import window_only
from hf_linattn.errors import UserError
from hf_linattn.evals.lm_eval_tasks import run_tasks
from hf_linattn.evals.task_data import no_download_counts, write_local_tasks

TASKS = ["piqa", "hellaswag", "arc_easy", "lambada_openai", "wikitext", "mmlu_social_sciences"]
METRICS = {
    "piqa": {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "n"},
    "hellaswag": {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "n"},
    "arc_easy": {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "n"},
    "lambada_openai": {"perplexity", "perplexity_stderr", "acc", "acc_stderr", "n"},
    "wikitext": {"word_perplexity", "byte_perplexity", "bits_per_byte", "n"},
    "mmlu_social_sciences": {"acc", "acc_stderr", "n"},
}


@pytest.fixture(scope="module")
def scores(converted, task_data):
    return run_tasks(converted.model, converted.tokenizer, TASKS, task_data=task_data, batch_size=1).metrics


def test_every_metric_is_a_plain_float(scores):
    assert {task: set(metrics) for task, metrics in scores.items()} == METRICS
    assert all(type(value) is float for metrics in scores.values() for value in metrics.values())
    assert [scores[task]["n"] for task in TASKS] == [5, 4, 5, 4, 3, 24]


@pytest.mark.parametrize("batch_size", [3, 8])
def test_batch_size_changes_no_figure(converted, task_data, scores, batch_size):
    batched = run_tasks(converted.model, converted.tokenizer, TASKS, task_data=task_data, batch_size=batch_size)
    for task, metrics in scores.items():
        for metric, value in metrics.items():
            assert batched.metrics[task][metric] == pytest.approx(value, rel=1e-5), (task, metric)


def test_encodings_of_one_model_serve_the_next(converted, task_data, scores, monkeypatch):
    encodings = {}
    first = run_tasks(converted.model, converted.tokenizer, TASKS, task_data=task_data, encodings=encodings)
    filled = dict(encodings)
    assert len(filled) > 50
    monkeypatch.setattr(type(converted.tokenizer), "encode", lambda *_, **__: pytest.fail("encoded again"))
    again = run_tasks(converted.model, converted.tokenizer, TASKS[:4], task_data=task_data, encodings=encodings)
    assert encodings == filled
    assert again.metrics == {task: first.metrics[task] for task in TASKS[:4]}
    for task, metrics in scores.items():
        assert first.metrics[task] == pytest.approx(metrics, rel=1e-5), task


def test_rows_are_scored_without_a_cache(converted, task_data):
    """What a cache costs is in proportion to a converted model's windows, not to the rows."""
    caches = []
    hook = converted.model.base_model.register_forward_hook(lambda _, args, out: caches.append(out.past_key_values))
    run_tasks(converted.model, converted.tokenizer, ["piqa", "wikitext"], task_data=task_data)
    hook.remove()
    assert caches
    assert all(cache is None for cache in caches)
    assert converted.model.config.use_cache


def test_templates_of_lm_eval_are_its_own_afterwards(converted, task_data):
    run_tasks(converted.model, converted.tokenizer, ["piqa"], task_data=task_data)
    assert "from_string" not in vars(lm_eval.utils.env)


def test_the_stock_command_gives_the_same_figures(converted, task_data, scores, tmp_path):
    """`lm_eval --model hf --model_args pretrained=OUT,trust_remote_code=True --include_path YAML --tasks ...`"""
    out, folder = tmp_path / "out", tmp_path / "yaml"
    folder.mkdir()
    converted.model.save_pretrained(out)
    converted.tokenizer.save_pretrained(out)
    write_local_tasks(task_data, TASKS, folder)
    with no_download_counts():
        stock = lm_eval.simple_evaluate(
            model="hf",
            model_args=f"pretrained={out},trust_remote_code=True",
            tasks=TASKS,
            task_manager=TaskManager(include_path=folder, include_defaults=False),
            batch_size=2,
            device="cpu",
            bootstrap_iters=0,
        )
    for task, metrics in scores.items():
        for metric, value in metrics.items():
            if metric != "n" and not metric.endswith("_stderr"):
                assert stock["results"][task][f"{metric},none"] == pytest.approx(value, rel=1e-5), (task, metric)


def test_the_control_differs_from_the_student(converted, task_data, scores):
    with window_only(converted.model):
        control = run_tasks(converted.model, converted.tokenizer, ["wikitext"], task_data=task_data).metrics
    student = scores["wikitext"]["word_perplexity"]
    assert control["wikitext"]["word_perplexity"] != pytest.approx(student, rel=1e-3)


def test_limit_and_few_shot_examples(converted, task_data):
    def run(**options):
        return run_tasks(converted.model, converted.tokenizer, ["mmlu_econometrics"], task_data=task_data, **options)

    assert run(limit=1).metrics["mmlu_econometrics"]["n"] == 1
    assert run().splits["mmlu_econometrics"].split == "test"
    seen = []
    hook = converted.model.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    run(limit=1)
    run(limit=1, num_fewshot=1)
    hook.remove()
    assert seen[-1] > 1.5 * seen[0]


def test_few_shot_examples_need_a_split_of_their_own(converted, task_data):
    with pytest.raises(
        UserError, match=r"num_fewshot: piqa takes its examples from the split train, expected .*train.parquet"
    ):
        run_tasks(converted.model, converted.tokenizer, ["piqa"], task_data=task_data, num_fewshot=2)


def test_the_hub_is_out_of_reach(converted, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="tasks: expected the data of piqa from the Hub, .*give it as task_data"):
        run_tasks(converted.model, converted.tokenizer, ["piqa"])


def test_a_tag_gives_its_tasks(converted, task_data):
    metrics = run_tasks(
        converted.model, converted.tokenizer, ["mmlu_social_sciences_tasks"], task_data=task_data, batch_size=8
    ).metrics
    assert len(metrics) == 12
    assert all(name.startswith("mmlu_") for name in metrics)


def test_random_states_and_tokenizer_are_left_alone(converted, task_data):
    random.seed(5)
    np.random.seed(6)
    torch.manual_seed(7)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(5)
    np.random.seed(6)
    torch.manual_seed(7)
    pad = converted.tokenizer.pad_token
    converted.tokenizer.pad_token = None
    try:
        run_tasks(converted.model, converted.tokenizer, ["piqa"], task_data=task_data)
        assert converted.tokenizer.pad_token is None
    finally:
        converted.tokenizer.pad_token = pad
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected
