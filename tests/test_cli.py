"""The command line: what each command does; bad input ends as a message and exit code 1 and leaves the disk alone."""

import json
import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import transformers
import yaml
from cli_runs import assert_refused, convert, left_behind, overrides, run, write_model, write_text
from transformers import AutoModelForCausalLM

import hf_linattn
from hf_linattn.conversion.config import recipe_names
from hf_linattn.info import device_name


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No test of this file may wait for a network that is not there."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    yield
    logging.getLogger("hf_linattn").setLevel(logging.NOTSET)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a softmax model."""
    return write_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "train.txt")


@pytest.fixture(scope="module")
def converted(tmp_path_factory, base, text):
    """A folder that `convert` wrote, and what it printed."""
    output = tmp_path_factory.mktemp("converted") / "out"
    return SimpleNamespace(folder=output, result=convert(base, output, text))


def test_convert_writes_a_scored_folder_that_reloads(converted):
    assert converted.result.exit_code == 0, converted.result.output
    for label in ("teacher", "student", "window only", "perplexity", "passkey"):
        assert label in converted.result.stdout
    card = (converted.folder / "README.md").read_text()
    assert "perplexity at" in card
    assert "evaluation.png" in card
    results = json.loads((converted.folder / "evaluation.json").read_text())
    assert set(results["ppl_by_position"]) == {"teacher", "student", "window_only"}
    assert results["recipe"] == "quick"
    assert (converted.folder / "evaluation.png").stat().st_size > 0
    model = AutoModelForCausalLM.from_pretrained(converted.folder)
    assert sorted(hf_linattn.linear_attention_modules(model)) == [1, 2, 3]
    assert left_behind(converted.folder.parent) == ["out"]


def test_convert_does_not_replace_a_folder_unasked(converted, base, text):
    before = (converted.folder / "conversion.json").read_bytes()
    assert_refused(convert(base, converted.folder, text, "--no-eval"), converted.folder, "--overwrite")
    assert (converted.folder / "conversion.json").read_bytes() == before


def test_dry_run_prints_a_recipe_that_loads_and_writes_nothing(base, tmp_path):
    output = tmp_path / "out"
    result = run(
        "convert", base, "-o", output, "--set", "attention.window=32", "--seed", 7, "--dry-run", "--device=cpu"
    )
    assert result.exit_code == 0, result.output
    recipe = yaml.safe_load(result.stdout)
    assert (recipe["attention"]["window"], recipe["seed"]) == (32, 7)
    again = tmp_path / "again.yaml"
    again.write_text(result.stdout)
    assert run("convert", base, "-o", output, "--recipe", again, "--dry-run").exit_code == 0
    assert not output.exists()


def test_finetune_then_eval_and_info(converted, text, tmp_path):
    tuned = tmp_path / "tuned"
    budget = ["--set", "tokens=128", "--set", "sequence_length=64", "--set", "batch_size=1", "--set", "dtype=float32"]
    result = run("finetune", converted.folder, "-o", tuned, "--data", text, *budget)
    assert result.exit_code == 0, result.output
    assert hf_linattn.linear_attention_modules(AutoModelForCausalLM.from_pretrained(tuned))

    report = tmp_path / "report"
    scope = ("--tasks", "none", "--recall-lengths", "300", "--text", text)
    result = run("eval", tuned, *scope, "-o", report)
    assert result.exit_code == 0, result.output
    results = json.loads((tmp_path / "report" / "evaluation.json").read_text())
    assert set(results["ppl_by_position"]) == {"student", "window_only"}
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        f"evaluation.{x}" for x in ("json", "md", "png")
    }

    result = run("info", tuned)
    assert result.exit_code == 0, result.output
    assert "chunked" in result.stdout
    assert "softmax layers      0" in result.stdout


def test_device_names(monkeypatch):
    """A GPU is named by its model: the one branch that no CPU reaches."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")
    assert device_name(torch.device("cuda:1")) == "cuda:1 (card 1)"
    assert device_name(torch.device("cpu")) == f"cpu ({torch.get_num_threads()} threads)"
    assert device_name(torch.device("xpu")) == "xpu"


def test_info_counts_the_bytes_of_a_real_state(converted):
    """The state that `info` announces is the one that a forward leaves in the cache."""
    from hf_linattn.info import model_facts

    model = AutoModelForCausalLM.from_pretrained(converted.folder)
    cache = model(torch.arange(40).unsqueeze(0), use_cache=True).past_key_values
    states = [cache.layers[i].state for i in hf_linattn.linear_attention_modules(model)]
    held = sum(tensor.nbytes for state in states for tensor in state if tensor is not None)
    facts = model_facts(converted.folder)
    assert facts.state_bytes == held
    assert facts.softmax_layers == (0,)
    keys, values = cache.layers[0].keys, cache.layers[0].values
    assert facts.softmax_kv_bytes_per_token == (keys.nbytes + values.nbytes) / 40
    assert facts.break_even_length == -(-held // facts.kv_bytes_per_token)


def test_generate_prints_the_greedy_continuation(converted):
    result = run("generate", converted.folder, "The fox", "--max-new-tokens", 8)
    assert result.exit_code == 0, result.output
    tokenizer = transformers.AutoTokenizer.from_pretrained(converted.folder)
    model = AutoModelForCausalLM.from_pretrained(converted.folder)
    inputs = tokenizer("The fox", return_tensors="pt")
    expected = tokenizer.decode(
        model.generate(**inputs, max_new_tokens=8, do_sample=False)[0], skip_special_tokens=True
    )
    assert result.stdout.strip() == expected.strip()


def test_bench_writes_a_results_file(tmp_path):
    result = run("bench", "--device", "cpu", "--shape", "1,2,64,16", "--runs", 1, "-o", tmp_path / "bench.json")
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "bench.json").read_text())
    assert {"device", "torch", "runs", "rows"} == set(written)
    assert {row["N"] for row in written["rows"]} == {64}
    (date,) = {row["run"] for row in written["rows"]}
    assert {"suite", "commit", "command", "copy_gbs", "peers"} == set(written["runs"][date])
    assert written["runs"][date]["command"].startswith("hf-linattn")


def test_recipes_are_listed_and_shown():
    listed = run("recipes").stdout
    for name in recipe_names():
        assert name in listed
    assert yaml.safe_load(run("recipes", "quick").stdout)["data"]["train"] == "self"
    assert_refused(run("recipes", "quik"), "quik", "'quick'")


class RecordingApi:
    """Stands for huggingface_hub.HfApi."""

    calls: list = []

    def create_repo(self, repo_id, **options):
        self.calls.append(("create_repo", repo_id, options))
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, **options):
        self.calls.append(("upload_folder", options))
        return SimpleNamespace(repo_url=f"https://huggingface.co/{options['repo_id']}")


def test_push_uploads_the_folder_as_it_is(converted, monkeypatch):
    monkeypatch.setattr(RecordingApi, "calls", [])
    monkeypatch.setattr(huggingface_hub, "HfApi", RecordingApi)
    card = (converted.folder / "README.md").read_bytes()
    result = run("push", converted.folder, "user/model", "--private")
    assert result.exit_code == 0, result.output
    created, uploaded = RecordingApi.calls
    assert created == ("create_repo", "user/model", {"private": True, "exist_ok": True})
    assert uploaded[1]["folder_path"] == converted.folder
    assert "https://huggingface.co/user/model" in result.stdout
    assert (converted.folder / "README.md").read_bytes() == card


def test_push_refuses_what_is_no_converted_model(base, tmp_path, monkeypatch):
    monkeypatch.setattr(RecordingApi, "calls", [])
    monkeypatch.setattr(huggingface_hub, "HfApi", RecordingApi)
    assert_refused(run("push", tmp_path / "absent", "user/model"), "absent")
    assert_refused(run("push", base, "user/model"), base, "hf-linattn convert")
    assert RecordingApi.calls == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bench", "--shape", "1,2"], ["--shape", "1,2"]),
        (["bench", "--dtype", "int8"], ["--dtype", "int8"]),
        (["info", "--device", "nowhere"], ["--device", "nowhere"]),
        (["info", "./absent"], ["./absent"]),
        (["eval", "./absent", "--tasks", "none"], ["./absent"]),
        (["eval", "./absent", "--resume"], ["--resume", "-o"]),
        (["finetune", "./absent", "-o", "./out", "--data", "./absent.txt"], ["absent"]),
        (["convert", "-o", "./out"], ["MODEL"]),
    ],
    ids=lambda value: "-".join(value).replace("/", "") if isinstance(value, list) else None,
)
def test_wrong_argument(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(run(*arguments), *words)
    assert left_behind(tmp_path) == []


def test_forced_backend_that_cannot_run(monkeypatch):
    monkeypatch.setenv("HF_LINATTN_BACKEND", "cuda")
    assert_refused(run("info", "--device", "cpu"), "HF_LINATTN_BACKEND", "cuda")


def test_debug_shows_the_traceback():
    result = run("--debug", "info", "./absent")
    assert isinstance(result.exception, hf_linattn.errors.UserError)


def test_ctrl_c_is_exit_code_130(monkeypatch):
    def interrupted(names=None):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_linattn.conversion.config.recipe_names", interrupted)
    assert run("recipes").exit_code == 130


def test_a_defect_keeps_its_traceback(monkeypatch):
    """Only what a user can mend is turned into a message."""

    def defect():
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("hf_linattn.conversion.config.recipe_names", defect)
    assert isinstance(run("recipes").exception, ZeroDivisionError)


# As processes ------------------------------------------------------------------------------------------------------


def process(*arguments, **environment):
    command = [sys.executable, *map(str, arguments)]
    variables = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, capture_output=True, text=True, check=False, env=variables, timeout=300)


def test_module_runs_and_reports_errors_without_traceback(tmp_path):
    result = process("-m", "hf_linattn", "info", tmp_path / "absent")
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_only_the_first_process_of_a_launch_prints(converted, text, tmp_path):
    budget = ["--set", "tokens=128", "--set", "sequence_length=32", "--set", "batch_size=1", "--set", "dtype=float32"]
    launch = [
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--rdzv_backend=c10d",
        "--rdzv_endpoint=localhost:0",
    ]
    arguments = ["finetune", converted.folder, "-o", tmp_path / "tuned", "--data", text, *budget]
    result = process(*launch, "-m", "hf_linattn", *arguments, ACCELERATE_USE_CPU="true")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "tuned" / "config.json").is_file()
    assert result.stderr.count(f"{tmp_path / 'tuned'} is complete") == 1


@pytest.mark.slow
def test_accelerate_launch(converted, text, tmp_path):
    budget = ["--set", "tokens=64", "--set", "sequence_length=32", "--set", "batch_size=1", "--set", "dtype=float32"]
    launch = ["-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes=1", "-m", "hf_linattn"]
    result = process(*launch, "finetune", converted.folder, "-o", tmp_path / "tuned", "--data", text, *budget)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "tuned" / "config.json").is_file()


def test_ablate_compares_variants_of_a_recipe(base, text, tmp_path):
    output = tmp_path / "ablation.json"
    result = run(
        *("ablate", base, "-o", output, "--data", text, "--recipe", "quick", "--device", "cpu"),
        *("--variant", "base", "--variant", "w8 attention.window=8 distillation.full=true"),
        *overrides(),
    )
    assert result.exit_code == 0, result.output
    for label in ("teacher", "base", "w8", "KL", "passkey"):
        assert label in result.stdout
    variants = json.loads(output.read_text())["variants"]
    assert set(variants) == {"teacher", "base", "w8"}
    assert variants["w8"]["overrides"] == ["attention.window=8", "distillation.full=true"]
    assert set(variants["base"]["recall"]) == {"student", "window_only"}
    assert variants["base"]["validation"] != variants["w8"]["validation"]
    assert (
        variants["base"]["ppl_by_position"]["window_only"].keys()
        == variants["teacher"]["ppl_by_position"]["teacher"].keys()
    )


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ((), "--variant: expected at least one"),
        (("window=8",), "expected 'NAME A.B=C ...', a name of its own first, got 'window=8'"),
        (("../a",), "a name of its own first, got '../a'"),
        (("a", "a"), "expected every name once, got 'a' twice"),
        (("a attention.windw=8",), "attention.window"),
    ],
)
def test_ablate_refuses_before_it_trains(base, text, tmp_path, variants, message):
    options = [part for variant in variants for part in ("--variant", variant)]
    assert_refused(run("ablate", base, "-o", tmp_path / "a.json", "--data", text, *options, *overrides()), message)
    assert not list(tmp_path.iterdir())


def test_select_layers_prints_an_override(base, text, tmp_path):
    output = tmp_path / "layers.json"
    options = ("--count", 2, "--window", 8, "--rows", 2, "--length", 64, "--device", "cpu", "-o", output)
    result = run("select-layers", base, "--data", text, *options)
    assert result.exit_code == 0, result.output
    found = json.loads(output.read_text())
    assert f"--set attention.softmax_layers={found['layers']}" in result.stdout
    assert len(found["layers"]) == len(found["rounds"]) == 2


def test_bench_measures_generation_of_a_converted_model(converted, tmp_path):
    output = tmp_path / "generation.json"
    options = ("--suite", "generation", "--runs", 1, "--device", "cpu", "-o", output)
    assert_refused(run("bench", *options), "--model", "got none")
    result = run("bench", "--model", converted.folder, *options)
    assert result.exit_code == 0, result.output
    rows = json.loads(output.read_text())["rows"]
    assert {(row["variant"], row["cache"]) for row in rows} == {
        (variant, cache) for variant in ("softmax", "student") for cache in ("dynamic", "static")
    }
    for only in ("caches=paged", "contexts=many", "rows=3"):
        assert_refused(
            run("bench", "--model", converted.folder, *options, "--only", only), "--only", only.split("=")[1]
        )
    some = ("--only", "contexts=16,32", "--only", "caches=dynamic", "--only", "variants=student")
    assert run("bench", "--model", converted.folder, *options, *some).exit_code == 0
    rows = json.loads(output.read_text())["rows"]
    assert [(row["variant"], row["cache"], row["context"]) for row in rows] == [
        ("student", "dynamic", 16),
        ("student", "dynamic", 32),
    ]
