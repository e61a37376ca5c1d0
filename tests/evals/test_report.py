"""Tables and plots from a results file."""

import copy

import pytest
from rich.console import Console

from hf_linattn.evals.report import plot_results, print_results, results_table, write_report
from hf_linattn.evals.results_file import write_results


def of_variants(teacher, student, window_only):
    return {"teacher": teacher, "student": student, "window_only": window_only}


RESULTS = {
    "recipe": "standard",
    "commit": "0123456789ab",
    "date": "2026-01-02T03:04:05+00:00",
    "tokens": 1000,
    "seconds": 60.0,
    "peak_gib": 1.5,
    "seed": 0,
    **of_variants(
        {
            "piqa": {"acc": 0.6, "acc_norm": 0.65, "acc_norm_stderr": 0.01, "n": 1838.0},
            "lambada_openai": {"perplexity": 50.0, "perplexity_stderr": 2.0, "acc": 0.3, "n": 5153.0},
            "sciq": {"acc": 0.8, "acc_norm": 0.75, "n": 1000.0},
            "wikitext": {"word_perplexity": 34.0, "byte_perplexity": 1.9, "bits_per_byte": 0.9, "n": 62.0},
        },
        {
            "piqa": {"acc": 0.6, "acc_norm": 0.637, "acc_norm_stderr": 0.01, "n": 1838.0},
            "lambada_openai": {"perplexity": 60.0, "acc": 0.27, "n": 5153.0},
            "sciq": {"acc": 0.8, "acc_norm": 0.75, "n": 1000.0},
            "wikitext": {"word_perplexity": 35.7, "byte_perplexity": 1.9, "bits_per_byte": 0.9, "n": 62.0},
        },
        {"piqa": {"acc": 0.5, "acc_norm": 0.585, "n": 1838.0}},
    ),
    "ppl_by_position": of_variants({"0-64": 80.0, "64-256": 35.0}, {"0-64": 80.0, "64-256": 42.0}, {}),
    "recall": of_variants(
        {"passkey": {"128": 1.0, "256": 1.0}, "mqar": {"256": 0.875}},
        {"passkey": {"128": 1.0, "256": 0.5}, "mqar": {"256": 0.5}},
        {"passkey": {"128": 0.25, "256": 0.0}},
    ),
    "command": "hf-linattn eval out",
    "evaluation": {
        "settings": {"limit": None},
        "part_seconds": {"teacher/piqa": 1.0, "student/piqa": 1.0, "window_only/piqa": 1.0},
        "splits": {
            "sciq": {"split": "validation", "stock_split": "test"},
            "piqa": {"split": "validation", "stock_split": "validation"},
        },
        "dtype": {"student": "bfloat16"},
        "batch_size": 8,
    },
    "environment": {"torch": "2.13.0", "transformers": "5.23.0", "lm_eval": "0.4.13", "device": "cpu"},
}


@pytest.fixture
def results():
    return copy.deepcopy(RESULTS)


def test_results_table(results):
    assert results_table(results).splitlines() == [
        "| | teacher | student | window only |",
        "|---|---|---|---|",
        "| piqa acc_norm | 0.650 | 0.637 (98.0%) | 0.585 (90.0%) |",
        "| lambada_openai acc | 0.300 | 0.270 (90.0%) |  |",
        "| sciq acc_norm | 0.750 | 0.750 (100.0%) |  |",
        "| mean of the 3 tasks | 0.567 | 0.552 (97.5%) |  |",
        "| lambada_openai perplexity | 50.00 | 60.00 (1.20x) |  |",
        "| wikitext word_perplexity | 34.00 | 35.70 (1.05x) |  |",
        "| perplexity at 0-64 | 80.00 | 80.00 (1.00x) |  |",
        "| perplexity at 64-256 | 35.00 | 42.00 (1.20x) |  |",
        "| passkey at 128 | 1.000 | 1.000 (100.0%) | 0.250 (25.0%) |",
        "| passkey at 256 | 1.000 | 0.500 (50.0%) | 0.000 (0.0%) |",
        "| mqar at 256 | 0.875 | 0.500 (57.1%) |  |",
        "",
        "2026-01-02; cpu; bfloat16; torch 2.13.0, transformers 5.23.0, lm_eval 0.4.13; commit 0123456789ab; "
        "sciq on its validation split (the test split is missing); `hf-linattn eval out`",
    ]


def test_table_without_a_teacher(results):
    results["teacher"] = {}
    for part in ("ppl_by_position", "recall"):
        del results[part]["teacher"]
    del results["evaluation"]["part_seconds"]["teacher/piqa"]
    lines = results_table(results).splitlines()
    assert lines[0] == "| | student | window only |"
    assert lines[2] == "| piqa acc_norm | 0.637 | 0.585 |"
    assert "%" not in "".join(lines)


def test_a_limited_run_says_so(results):
    results["evaluation"]["settings"]["limit"] = 20
    assert "first 20 documents of each task only" in results_table(results)


def test_the_table_of_a_file_is_that_of_its_content(results, tmp_path):
    write_results(tmp_path / "results.json", results)
    assert results_table(tmp_path / "results.json") == results_table(results)


def test_print_results(results):
    console = Console(record=True, width=200)
    print_results(results, console)
    text = console.export_text()
    for expected in ("window only", "0.637 (98.0%)", "60.00 (1.20x)", "mqar at 256", "commit 0123456789ab"):
        assert expected in text


def test_plots(results, tmp_path):
    path = plot_results(results, tmp_path / "page.png")
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    results["recall"]["student"]["passkey"]["256"] = 1.0
    assert plot_results(results, tmp_path / "other.png").read_bytes() != content


def test_report_of_a_run_with_nothing_but_recall(results, tmp_path):
    for key in ("teacher", "student", "window_only", "ppl_by_position"):
        results[key] = {}
    table, page = write_report(results, tmp_path / "report")
    assert table.read_text().count("\n") == 7
    assert page.read_bytes().startswith(b"\x89PNG")
