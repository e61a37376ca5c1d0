"""A whole evaluation: the three variants, the results file after every part, reuse after a kill, refusals."""

import gc
import json
import weakref

import pytest
from tiny_models import tiny_model

from hf_linattn.errors import UserError
from hf_linattn.evals import run
from hf_linattn.evals.lm_eval_tasks import run_tasks
from hf_linattn.evals.perplexity import perplexity_by_position
from hf_linattn.evals.recall import mqar, passkey
from hf_linattn.evals.results_file import read_results, write_results
from hf_linattn.evals.run import evaluate

TEXT = "It is a long way from here to there, and longer still in the rain. "
KEYS = {"recipe", "commit", "date", "tokens", "seconds", "peak_gib", "seed", "teacher", "student", "window_only"}
KEYS |= {"ppl_by_position", "recall", "command", "evaluation", "environment"}
PARTS = ["ppl_by_position", "passkey", "mqar", "piqa", "wikitext"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "documents.jsonl"
    rows = [{"text": TEXT * 5, "source": "books"}, {"text": TEXT[::-1] * 5, "source": "books"}]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture
def options(task_data, text):
    return {
        "tasks": ("piqa", "wikitext"),
        "task_data": task_data,
        "limit": 2,
        "text": text,
        "text_source": "books",
        "text_length": 200,
        "recall_lengths": (320, 400),
        "recall_trials": 2,
    }


def teacher():
    return tiny_model("llama", max_position_embeddings=1024, num_hidden_layers=2)


def test_evaluate(converted, options, tmp_path):
    output = tmp_path / "deep" / "results.json"
    calls = []
    results = evaluate(
        converted.model,
        converted.tokenizer,
        teacher=teacher,
        output=output,
        command="hf-linattn eval out",
        conversion={"recipe": "quick", "tokens": 1000, "seconds": 2.5, "peak_gib": 0.1, "seed": 7},
        progress=lambda *call: calls.append(call),
        **options,
    )
    assert set(results) == KEYS
    assert json.loads(output.read_text()) == results
    assert (results["recipe"], results["tokens"], results["seed"]) == ("quick", 1000, 7)
    assert results["command"] == "hf-linattn eval out"
    assert set(results["environment"]) == {"torch", "transformers", "lm_eval", "device"}
    assert results["evaluation"]["dtype"] == dict.fromkeys(run.VARIANTS, "float32")
    assert results["evaluation"]["splits"]["piqa"] == {"split": "validation", "stock_split": "validation"}
    for variant in run.VARIANTS:
        assert set(results[variant]) == {"piqa", "wikitext"}
        assert set(results["ppl_by_position"][variant]) == {"0-64", "64-200"}
        assert {kind: set(curve) for kind, curve in results["recall"][variant].items()} == {
            "passkey": {"320", "400"},
            "mqar": {"320", "400"},
        }
    names = [f"{variant}/{part}" for variant in run.VARIANTS for part in PARTS]
    assert calls == [(name, done, 15) for done, name in enumerate(names)] + [("done", 15, 15)]
    assert list(results["evaluation"]["part_seconds"]) == names

    # Each figure is the one its own function gives for the same variant.
    alone = run_tasks(
        converted.model, converted.tokenizer, ["wikitext"], task_data=options["task_data"], limit=2, batch_size=8
    ).metrics
    assert results["student"]["wikitext"] == alone["wikitext"]
    documents = [TEXT * 5, TEXT[::-1] * 5]
    of_teacher = perplexity_by_position(teacher(), converted.tokenizer, documents, max_length=200)
    assert results["ppl_by_position"]["teacher"] == pytest.approx(of_teacher)
    word = [results[variant]["wikitext"]["word_perplexity"] for variant in run.VARIANTS]
    assert len(set(word)) == 3
    assert results["recall"]["student"]["mqar"]["400"] == mqar(
        converted.model, converted.tokenizer, (400,), trials=2
    ).get(400)


def test_a_kill_loses_only_the_part_that_ran(converted, options, tmp_path):
    output = tmp_path / "results.json"
    student = converted.model
    loaded = []

    def load_teacher():
        loaded.append("teacher")
        return teacher()

    def run_once(progress=None, reuse=False):
        return evaluate(
            student,
            converted.tokenizer,
            teacher=load_teacher,
            output=output,
            reuse=reuse,
            progress=progress,
            **options,
        )

    def kill_at(part, done, total):
        if part == "student/piqa":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_once(kill_at)
    assert list(read_results(output)["evaluation"]["part_seconds"]) == [
        *(f"teacher/{part}" for part in PARTS),
        *(f"student/{part}" for part in PARTS[:3]),
    ]
    calls = []
    resumed = run_once(lambda *call: calls.append(call), reuse=True)
    assert loaded == ["teacher"]
    assert calls[0] == ("student/piqa", 8, 15)
    whole = run_once()
    for key in ("teacher", "student", "window_only", "ppl_by_position", "recall"):
        assert resumed[key] == whole[key], key
    calls.clear()
    assert run_once(lambda *call: calls.append(call), reuse=True)["recall"] == whole["recall"]
    assert calls == [("done", 15, 15)]


def test_reuse_refuses_other_settings(converted, options, tmp_path):
    output = tmp_path / "results.json"
    options |= {"tasks": (), "text": None, "text_source": None, "variants": ("student",)}
    evaluate(converted.model, converted.tokenizer, output=output, **options)
    before = output.read_bytes()
    options["recall_trials"] = 3
    with pytest.raises(UserError, match=r"scored with recall_trials=2, now recall_trials=3"):
        evaluate(converted.model, converted.tokenizer, output=output, reuse=True, **options)
    assert output.read_bytes() == before


def test_the_teacher_is_freed_before_the_student_is_loaded(converted, options):
    alive = []

    def load_teacher():
        model = teacher()
        alive.append(weakref.ref(model))
        return model

    def load_student():
        gc.collect()
        assert alive[0]() is None
        return converted.model

    options |= {"tasks": (), "recall_lengths": ()}
    results = evaluate(load_student, converted.tokenizer, teacher=load_teacher, **options)
    assert set(results["ppl_by_position"]) == set(run.VARIANTS)


def test_variants_and_parts_left_out(converted, options):
    options |= {"tasks": ("piqa",), "text": None, "text_source": None, "recall_lengths": ()}
    results = evaluate(converted.model, converted.tokenizer, variants=("window_only", "teacher"), **options)
    assert list(results["evaluation"]["part_seconds"]) == ["window_only/piqa"]  # no teacher was given
    assert results["student"] == results["teacher"] == results["recall"] == results["ppl_by_position"] == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("piqa", "wikitxt")}, "got 'wikitxt'; did you mean wikitext"),
        ({"tasks": ("boolq",)}, "expected the folder .*boolq for task boolq"),
        ({"variants": ("student", "windows")}, "variants: expected some of teacher, student, window_only"),
        ({"conversion": {"recipes": "x"}}, "conversion: expected facts among recipe, .*got 'recipes'"),
        ({"text_source": "films"}, "got none of source 'films'; the file has books"),
        ({"recall_lengths": (320, 2048)}, "recall_lengths: expected at most 1024 tokens"),
        ({"text_length": 1000}, "at least 1000 tokens to fill the bucket 512-1000, the longest has 335"),
    ],
    ids=["task", "data", "variant", "fact", "source", "recall-positions", "text-short"],
)
def test_bad_input_is_refused_before_anything_is_scored(changes, message, converted, options, tmp_path):
    output = tmp_path / "results.json"
    output.write_text("an earlier result")
    with pytest.raises(UserError, match=message):
        evaluate(converted.model, converted.tokenizer, output=output, **options | changes)
    assert output.read_text() == "an earlier result"


def test_text_beyond_the_models_positions(converted, options, tmp_path):
    path = tmp_path / "long.txt"
    path.write_text(TEXT * 40)
    options |= {"text": path, "text_source": None, "text_length": 2048}
    with pytest.raises(UserError, match="text_length: expected at most 1024 tokens, .* got 2048"):
        evaluate(converted.model, converted.tokenizer, **options)


def test_a_failed_write_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "results.json"
    write_results(path, {"evaluation": {}, "value": 1})
    with pytest.raises(TypeError):
        write_results(path, {"evaluation": {}, "value": object()})
    assert read_results(path)["value"] == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ('{"evaluation": {', "breaks off"),
        ('{"a": 1}', "holds something else"),
        ("[]", "holds"),
    ],
    ids=["absent", "cut", "other", "list"],
)
def test_a_file_that_holds_no_results(content, message, tmp_path):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match=message):
        read_results(tmp_path / "results.json")


def test_recall_depends_on_the_seed(converted, options):
    options |= {"tasks": (), "text": None, "text_source": None, "variants": ("student",)}
    results = evaluate(converted.model, converted.tokenizer, seed=3, **options)
    expected = passkey(converted.model, converted.tokenizer, (320, 400), trials=2, seed=3)
    assert results["recall"]["student"]["passkey"] == {str(length): share for length, share in expected.items()}
    assert results["evaluation"]["settings"]["seed"] == 3
