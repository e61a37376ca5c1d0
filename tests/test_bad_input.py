"""Bad input to `hf-linattn convert`: each a clear message, exit code 1, nothing half-written, earlier results kept."""

import errno
import os

import huggingface_hub
import pytest
import transformers
from cli_runs import assert_refused, convert, left_behind, run, write_model, write_text
from tiny_models import tiny_tokenizer
from transformers import AutoModelForCausalLM


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No test of this file may wait for a network that is not there."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "train.txt")


@pytest.mark.parametrize("model", ["no-such-owner/no-such-model", "./no/such/folder", "absent.gguf"])
def test_missing_model(model, text, tmp_path):
    assert_refused(convert(model, tmp_path / "out", text), model)
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize("model_type", ["bloom", "gptj"])
def test_model_of_an_unsupported_type(model_type, text, tmp_path):
    sizes = {"vocab_size": 128, "hidden_size": 32, "n_embd": 32, "n_head": 2, "n_layer": 2, "rotary_dim": 8}
    config = transformers.AutoConfig.for_model(model_type, **sizes)
    model = tmp_path / "model"
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    tiny_tokenizer(model)
    assert_refused(convert(model, tmp_path / "out", text), model_type)
    assert left_behind(tmp_path) == ["model"]


def test_misspelt_key_of_a_recipe(base, text, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("transfer: {lerning_rate: 0.1}\n")
    result = run("convert", base, "-o", tmp_path / "out", "--recipe", recipe, "--data", text)
    assert_refused(result, "mine.yaml", "lerning_rate", "learning_rate")
    assert_refused(convert(base, tmp_path / "out", text, atention__window=8), "atention", "attention")
    assert left_behind(tmp_path) == ["mine.yaml"]


def test_truncated_safetensors(base, text, tmp_path):
    model = write_model(tmp_path / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert_refused(convert(model, tmp_path / "out", text), model, "safetensors")
    assert_refused(run("generate", model, "The"), model, "safetensors")
    assert left_behind(tmp_path) == ["model"]


def test_full_disk_while_saving(base, text, tmp_path, monkeypatch):
    """An earlier result survives; the run stays, so that --resume finishes it."""
    output = tmp_path / "out"
    output.mkdir()
    (output / "earlier").write_text("result")

    def full(self, folder, **options):
        (folder / "config.json").write_text("{")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))

    with monkeypatch.context() as patch:
        patch.setattr(transformers.PreTrainedModel, "save_pretrained", full)
        result = convert(base, output, text, "--overwrite", "--no-eval")
    assert_refused(result, output, "--resume")
    assert left_behind(tmp_path) == ["out", "out.run"]
    assert left_behind(output) == ["earlier"]

    result = convert(base, output, text, "--overwrite", "--resume", "--no-eval")
    assert result.exit_code == 0, result.output
    assert "attention_transfer: step" not in result.output
    AutoModelForCausalLM.from_pretrained(output)


def test_data_file_without_text(base, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"body": "no such column"}\n')
    assert_refused(convert(base, tmp_path / "out", data), data, "text", "body")
    assert_refused(convert(base, tmp_path / "out", tmp_path / "absent.txt"), "absent.txt")
    assert left_behind(tmp_path) == ["data.jsonl"]


def test_rows_longer_than_the_models_positions(base, text, tmp_path):
    assert_refused(convert(base, tmp_path / "out", text, transfer__sequence_length=1024), "1024", "512")
    assert left_behind(tmp_path) == []


def test_loss_that_is_nan(base, text, tmp_path):
    result = convert(base, tmp_path / "out", text, distillation__learning_rate="1e30", distillation__clip="1e30")
    assert_refused(result, "loss", "learning_rate")
    assert left_behind(tmp_path) == ["out.run"]


def test_evaluation_input_is_checked_before_the_conversion(base, text, tmp_path):
    output = tmp_path / "out"
    assert_refused(convert(base, output, text, evaluation__tasks="[piqqa]"), "piqqa", "piqa")
    assert_refused(convert(base, output, text, "--text", tmp_path / "absent.txt"), "absent.txt")
    result = convert(base, output, text, "--task-data", tmp_path / "tasks", evaluation__tasks="[piqa]")
    assert_refused(result, tmp_path / "tasks")
    assert left_behind(tmp_path) == []
