"""A converted model under training code that knows nothing of it: packing, checkpointing, PEFT, Trainer."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_linattn import LinearAttentionConfig, linear_attention_modules, linearize, set_attention_dropout
from hf_linattn.trainer_callback import AttentionDropoutSchedule

FORMS = {
    "window": LinearAttentionConfig(window=4, decay="scalar"),
    "hybrid": LinearAttentionConfig(window=4, softmax_layers=(0, 3), decay="fixed"),
    "pure": LinearAttentionConfig(feature_map="t2r", window=0),
}


@pytest.fixture(params=list(FORMS))
def model(request):
    torch.manual_seed(0)
    return linearize(tiny_model("llama"), FORMS[request.param])


def ids(batch=2, length=24, seed=0):
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


def gradients(model, **kwargs):
    model.zero_grad()
    model(**kwargs, use_cache=False).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_every_new_parameter_gets_a_gradient(model):
    found = gradients(model, input_ids=ids(), labels=ids())
    names = [n for n, _ in model.named_parameters() if ".linear_attention." in n]
    assert names
    for name in names:
        assert torch.isfinite(found[name]).all(), name
        assert found[name].abs().sum() > 0, name


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(model, reentrant):
    expected = gradients(model, input_ids=ids(), labels=ids())
    model.train()
    set_attention_dropout(model, 0.0)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    found = gradients(model, input_ids=ids(), labels=ids())
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, atol=1e-5), name


@torch.no_grad()
def test_packed_documents_equal_separate_ones(model):
    lengths = [9, 1, 14]
    x = ids(1, sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = model(x, position_ids=positions, use_cache=False).logits[0]
    for part, logits in zip(x[0].split(lengths), packed.split(lengths), strict=True):
        alone = model(part[None], use_cache=False).logits[0]
        assert (logits - alone).abs().max() < 1e-4 * packed.abs().max()


@torch.no_grad()
def test_packed_rows_equal_separate_documents(model):
    """Documents of different lengths in each row of a batch."""
    rows = [[10, 14], [24]]
    x = ids(2, 24)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])
    packed = model(x, position_ids=positions, use_cache=False).logits
    for b, row in enumerate(rows):
        for part, logits in zip(x[b].split(row), packed[b].split(row), strict=True):
            assert (logits - model(part[None], use_cache=False).logits[0]).abs().max() < 1e-4 * packed.abs().max()


def test_lora_trains_saves_and_merges(model, tmp_path):
    model.save_pretrained(tmp_path / "base")
    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["linear_attention"], task_type="CAUSAL_LM"
    )
    peft_model = get_peft_model(model, config).train()
    trained = [n for n, p in peft_model.named_parameters() if p.requires_grad]
    assert any(".linear_attention.modules_to_save." in n for n in trained)
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = peft_model(input_ids=ids(), labels=ids(), use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    peft_model.eval()
    with torch.no_grad():
        expected = peft_model(input_ids=ids(), use_cache=False).logits
        peft_model.save_pretrained(tmp_path / "adapter")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")
        assert torch.allclose(adapted(input_ids=ids(), use_cache=False).logits, expected, atol=1e-4)
        merged = peft_model.merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert torch.allclose(reloaded(ids(), use_cache=False).logits, expected, atol=1e-4)


def test_trainer_unchanged(model, tmp_path):
    data = Dataset.from_dict({"input_ids": ids(16, 20).tolist(), "labels": ids(16, 20).tolist()})
    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1, save_steps=2,
        report_to=[], use_cpu=True, seed=1,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    with torch.no_grad():
        assert torch.equal(
            reloaded(ids(), use_cache=False).logits, trainer.model.eval()(ids(), use_cache=False).logits
        )


def test_dropout_schedule_under_trainer(model, tmp_path):
    seen = []
    module = next(iter(linear_attention_modules(model).values()))
    module.register_forward_pre_hook(lambda *_: seen.append(module.dropout.p))
    data = Dataset.from_dict({"input_ids": ids(16, 20).tolist(), "labels": ids(16, 20).tolist()})
    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=4, report_to=[], use_cpu=True, save_strategy="no"
    )
    Trainer(model, arguments, train_dataset=data, callbacks=[AttentionDropoutSchedule(0.2)]).train()
    assert seen == pytest.approx([0.2, 0.15, 0.1, 0.05])
    with pytest.raises(ValueError, match=r"p: expected a number in \[0, 1\), got 2"):
        AttentionDropoutSchedule(2)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_autocast_keeps_the_state_in_fp32(model, dtype):
    exact = model(ids(), use_cache=False).logits
    with torch.autocast("cpu", dtype):
        result = model(input_ids=ids(), labels=ids(), use_cache=True)
    result.loss.backward()
    assert (result.logits - exact).abs().max() < 0.1 * exact.abs().max()
    states = [layer.state for layer in result.past_key_values.layers if hasattr(layer, "state")]
    assert all(s.kv.dtype == torch.float32 for s in states)
    for module in linear_attention_modules(model).values():
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in module.parameters())
