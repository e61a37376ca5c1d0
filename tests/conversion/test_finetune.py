"""`finetune` keeps training a converted folder and leaves another complete one."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_linattn.conversion import training_loop
from hf_linattn.conversion.config import load_finetune_config
from hf_linattn.conversion.finetune import finetune
from hf_linattn.conversion.pipeline import convert
from hf_linattn.errors import UserError

SETTINGS = (
    "tokens=3072",
    "sequence_length=64",
    "batch_size=4",
    "learning_rate=5e-3",
    "data.validation_rows=2",
    "data.validation_fraction=0.02",
    "checkpoint_every=3",
    "dtype=float32",
)


@pytest.fixture(scope="module")
def converted_folder(model_folder, text_file, tiny_recipe, tmp_path_factory):
    output = tmp_path_factory.mktemp("converted") / "out"
    config = tiny_recipe("transfer.tokens=256", "distillation.tokens=0")
    convert(str(model_folder), output, config, data=str(text_file), device="cpu")
    return output


def losses(folder):
    records = [json.loads(line) for line in (folder / "training_metrics.jsonl").read_text().splitlines()]
    return [r["loss"] for r in records if r["stage"] == "finetuning"]


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_finetuning_learns_and_reloads(converted_folder, text_file, tmp_path, full):
    config = load_finetune_config(None, (*SETTINGS, f"full={str(full).lower()}"))
    summary = finetune(str(converted_folder), tmp_path / "out", str(text_file), config, device="cpu")
    history = losses(tmp_path / "out")
    assert len(history) == 12
    assert sum(history[-3:]) < 0.95 * sum(history[:3])
    before, after = (AutoModelForCausalLM.from_pretrained(f) for f in (converted_folder, tmp_path / "out"))
    changed = {n for n, p in before.named_parameters() if not torch.equal(p, after.get_parameter(n))}
    assert any("self_attn.q_proj" in n for n in changed)
    assert any("linear_attention" in n for n in changed)
    assert any("mlp" in n for n in changed) == full
    assert summary["model"] == "model"
    assert (tmp_path / "out" / "README.md").exists()


def test_new_parameters_can_be_left_alone(converted_folder, text_file, tmp_path):
    config = load_finetune_config(None, (*SETTINGS, "tokens=512", "train_new_parameters=false"))
    finetune(str(converted_folder), tmp_path / "out", str(text_file), config, device="cpu")
    before, after = (AutoModelForCausalLM.from_pretrained(f) for f in (converted_folder, tmp_path / "out"))
    for name, parameter in before.named_parameters():
        assert torch.equal(parameter, after.get_parameter(name)) == ("_proj" not in name or "mlp" in name), name


def test_an_interrupted_run_resumes_with_the_same_losses(converted_folder, text_file, tmp_path, monkeypatch):
    config = load_finetune_config(None, SETTINGS)
    finetune(str(converted_folder), tmp_path / "unbroken", str(text_file), config, device="cpu")

    def fail_at_8(loss, norm, where):
        if where.endswith("step 8"):
            raise KeyboardInterrupt

    monkeypatch.setattr(training_loop, "_check_finite", fail_at_8)
    with pytest.raises(KeyboardInterrupt):
        finetune(str(converted_folder), tmp_path / "out", str(text_file), config, device="cpu")
    monkeypatch.undo()
    finetune(str(converted_folder), tmp_path / "out", str(text_file), config, device="cpu", resume=True)
    assert losses(tmp_path / "out") == losses(tmp_path / "unbroken")


def test_a_model_never_converted_is_named(model_folder, text_file, tmp_path):
    with pytest.raises(UserError, match="is not a converted model; run `hf-linattn convert`"):
        finetune(str(model_folder), tmp_path / "out", str(text_file), load_finetune_config(), device="cpu")
