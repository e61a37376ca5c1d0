"""`convert` as a user calls it: a complete folder, or a message and nothing half-written."""

import json
import shutil

import pytest
import torch
from safetensors import SafetensorError
from tiny_models import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_linattn import linear_attention_modules
from hf_linattn.conversion import pipeline
from hf_linattn.conversion.config import load_recipe
from hf_linattn.conversion.pipeline import convert
from hf_linattn.errors import UserError

IDS = torch.arange(1, 41).unsqueeze(0)


@pytest.fixture(scope="module")
def converted_folder(model_folder, text_file, tiny_recipe, tmp_path_factory):
    """(folder, summary, logits of the model before it was saved)."""
    output = tmp_path_factory.mktemp("converted") / "out"
    kept = {}
    original = pipeline.fill_folder

    def keep(folder, model, *rest):
        with torch.no_grad():
            kept["logits"] = model(input_ids=IDS).logits
        original(folder, model, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "fill_folder", keep)
        summary = convert(str(model_folder), output, tiny_recipe(), data=str(text_file), device="cpu")
    return output, summary, kept["logits"]


def test_folder_is_complete_and_reloads_with_equal_logits(converted_folder):
    output, _, logits = converted_folder
    names = {path.name for path in output.iterdir()}
    expected = {"model.safetensors", "config.json", "tokenizer.json", "generation_config.json", "README.md"}
    assert expected | {"modeling_hf_linattn.py", "recipe.yaml", "training_metrics.jsonl", "conversion.json"} <= names
    model = AutoModelForCausalLM.from_pretrained(output)
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, logits)
    assert sorted(linear_attention_modules(model)) == [1, 2, 3]
    assert AutoTokenizer.from_pretrained(output)("abc")["input_ids"]
    assert {path.name for path in output.parent.iterdir()} == {"out"}


def test_the_recipe_in_the_folder_is_the_one_that_ran(converted_folder):
    output, summary, _ = converted_folder
    assert load_recipe(output / "recipe.yaml").model_dump(mode="json") == summary["config"]


def test_summary_and_metrics(converted_folder):
    output, summary, _ = converted_folder
    assert json.loads((output / "conversion.json").read_text()) == summary
    assert summary["tokens"] == 4096
    assert set(summary["stages"]) == {"attention_transfer", "logit_distillation"}
    assert summary["stages"]["attention_transfer"]["steps"] == 8
    assert set(summary["validation"]["logit_distillation"]) == {"kl", "ce", "teacher_ce", "window_only_kl"}
    assert {"seconds", "peak_gib", "seed"} <= set(summary)
    records = [json.loads(line) for line in (output / "training_metrics.jsonl").read_text().splitlines()]
    assert [r["stage"] for r in records] == (
        ["attention_transfer"] * 8 + ["validation"] + ["logit_distillation"] * 8 + ["validation"]
    )


def test_a_finished_run_is_not_run_again(converted_folder, model_folder, text_file, tiny_recipe, monkeypatch):
    output, summary, _ = converted_folder
    monkeypatch.setattr(pipeline, "load_model", lambda *a, **k: pytest.fail("ran again"))
    again = convert(str(model_folder), output, tiny_recipe(), data=str(text_file), device="cpu", resume=True)
    assert again == summary


def test_stages_train_with_the_training_window(model_folder, text_file, tmp_path, tiny_recipe, monkeypatch):
    windows = {}

    def look(stage, function):
        def run(accelerator, model, *rest, **options):
            windows[stage] = sorted(m.window for m in linear_attention_modules(model).values())
            return function(accelerator, model, *rest, **options)

        return run

    for module, name in (
        (pipeline.attention_transfer, "transfer_attention"),
        (pipeline.logit_distillation, "distill_logits"),
    ):
        monkeypatch.setattr(module, name, look(name, getattr(module, name)))
    recipe = tiny_recipe(
        "attention.layer_windows={2: 40, 3: 12}",
        "training_window=12",
        "transfer.tokens=256",
        "distillation.tokens=256",
    )
    output = tmp_path / "out"
    convert(str(model_folder), output, recipe, data=str(text_file), device="cpu")
    assert windows == {"transfer_attention": [8, 12, 12], "distill_logits": [8, 12, 12]}
    kept = AutoModelForCausalLM.from_pretrained(output)
    assert [m.window for m in linear_attention_modules(kept).values()] == [8, 40, 12]


def test_full_training_and_no_data(model_folder, tmp_path, tiny_recipe):
    config = tiny_recipe("distillation.full=true", "data.self_sampling.batch_size=16")
    summary = convert(str(model_folder), tmp_path / "out", config, data="self", device="cpu")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    original = tiny_model("llama")
    changed = {n for n, p in original.named_parameters() if not torch.equal(p, model.get_parameter(n))}
    assert changed
    assert all(".self_attn." in name for name in changed)
    assert (
        summary["validation"]["logit_distillation"]["kl"]
        < summary["validation"]["logit_distillation"]["window_only_kl"]
    )


def test_gguf_free_bfloat16_is_saved_in_bfloat16(model_folder, text_file, tmp_path, tiny_recipe):
    config = tiny_recipe("dtype=bfloat16", "transfer.tokens=512", "distillation.tokens=512")
    convert(str(model_folder), tmp_path / "out", config, data=str(text_file), device="cpu")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert linear_attention_modules(model)[1].log_scale.dtype == torch.float32


def run(model_folder, text_file, output, config, **options):
    return convert(str(model_folder), output, config, data=str(text_file), device="cpu", **options)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), SafetensorError("Error while serializing: No space left on device")],
    ids=["oserror", "safetensors"],
)
def test_a_full_disk_leaves_the_earlier_result(model_folder, text_file, tmp_path, tiny_recipe, monkeypatch, error):
    earlier = tmp_path / "out"
    earlier.mkdir()
    (earlier / "model.safetensors").write_bytes(b"earlier")
    before = contents(earlier)
    short = tiny_recipe("transfer.tokens=512", "distillation.tokens=512")
    save = PreTrainedModel.save_pretrained

    def fail(self, folder, *args, **kwargs):
        save(self, folder, *args, **kwargs)
        raise error

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", fail)
    with pytest.raises(UserError, match=r"cannot write .*out.*No space left.*unchanged; free some space.*--resume"):
        run(model_folder, text_file, earlier, short, overwrite=True)
    assert contents(earlier) == before
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.run"}
    # The training is not lost: with space again, --resume only saves.
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save)
    run(model_folder, text_file, earlier, short, overwrite=True, resume=True)
    assert AutoModelForCausalLM.from_pretrained(earlier)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_no_room_on_the_disk_is_found_before_training(model_folder, text_file, tmp_path, tiny_recipe, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"0.0 GiB free, the model needs 0.0 GiB"):
        run(model_folder, text_file, tmp_path / "out", tiny_recipe())
    assert not list(tmp_path.iterdir()) or not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["distillation.learning_rate=1e30"], r"logit_distillation: step \d+: the (loss|gradient norm) is (nan|inf)"),
        (["transfer.sequence_length=1024"], r"rows of 1024 tokens are longer than the model's 512 positions"),
        (
            ["softmax_every=null", "attention.softmax_layers=[9]"],
            r"softmax_layers: \[9\] are not layers of this model",
        ),
        (["data.max_documents=1", "transfer.sequence_length=512"], r"too few for one training row and one validation"),
    ],
)
def test_bad_numbers_are_named_and_nothing_is_written(
    model_folder, text_file, tmp_path, tiny_recipe, overrides, message
):
    with pytest.raises(UserError, match=message):
        run(model_folder, text_file, tmp_path / "out", tiny_recipe(*overrides))
    assert not (tmp_path / "out").exists()


def test_bad_places_are_named(model_folder, text_file, tmp_path, tiny_recipe):
    config = tiny_recipe()
    with pytest.raises(UserError, match="no such folder"):
        run(tmp_path / "missing", text_file, tmp_path / "out", config)
    with pytest.raises(UserError, match="no such file or folder"):
        run(model_folder, tmp_path / "missing.txt", tmp_path / "out", config)
    with pytest.raises(UserError, match="is the model's own folder"):
        run(model_folder, text_file, model_folder, config, overwrite=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file; expected a folder"):
        run(model_folder, text_file, tmp_path / "file", config)
    with pytest.raises(UserError, match="exists already; name another folder, or replace it with --overwrite"):
        run(model_folder, text_file, tmp_path, config)
    with pytest.raises(UserError, match="device: expected cpu, cuda or cuda:N, got 'gpu'"):
        convert(str(model_folder), tmp_path / "out", config, data=str(text_file), device="gpu")


def test_a_converted_model_is_not_converted_again(converted_folder, text_file, tmp_path, tiny_recipe):
    with pytest.raises(UserError, match="is converted already"):
        run(converted_folder[0], text_file, tmp_path / "out", tiny_recipe())


def test_a_model_that_cannot_be_converted_is_named(text_file, tmp_path, tiny_recipe):
    from transformers import FalconConfig, FalconForCausalLM

    config = FalconConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    FalconForCausalLM(config).save_pretrained(tmp_path / "falcon")
    tiny_tokenizer(tmp_path / "falcon")
    with pytest.raises(UserError, match="cannot convert a 'falcon' model"):
        run(tmp_path / "falcon", text_file, tmp_path / "out", tiny_recipe())
    assert not (tmp_path / "out").exists()
