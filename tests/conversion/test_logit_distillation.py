"""Logit distillation: the teacher from the same weights is the original model, and the student comes nearer to it."""

import pytest
import torch
from tiny_models import ARCHITECTURES, tiny_model

from hf_linattn import LinearAttentionConfig, linear_attention_modules, linearize
from hf_linattn.conversion.adapters import make_trainable, merged
from hf_linattn.conversion.config import DistillationConfig
from hf_linattn.conversion.data import stack_rows
from hf_linattn.conversion.logit_distillation import distill_logits, measure_divergence, teacher_logits
from hf_linattn.conversion.training_loop import Phase, logits_of, training_phases
from hf_linattn.errors import UserError

FP32 = torch.float32


def converted(name="llama", **options):
    return linearize(tiny_model(name), LinearAttentionConfig(**{"window": 4, "softmax_layers": (0,)} | options))


def config(steps=12, **options):
    values = {
        "tokens": steps * 4 * 64,
        "sequence_length": 64,
        "batch_size": 4,
        "learning_rate": 5e-3,
        "feature_map_learning_rate": 1e-2,
    }
    return DistillationConfig(**values | options)


def divergence(accelerator, student, corpus, teacher=None):
    return measure_divergence(
        accelerator, student, corpus, sequence_length=64, num_rows=4, dtype=FP32, teacher=teacher
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_teacher_is_the_original_model_exactly(name, corpus):
    original, student = tiny_model(name), make_trainable(converted(name), config(lora_rank=2))
    with torch.no_grad():
        for parameter_name, parameter in student.named_parameters():
            if "lora_" in parameter_name:
                parameter.normal_()
    batch = stack_rows(corpus, [0, 1], 64)
    student.train()
    expected = original(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
    assert torch.equal(teacher_logits(student, batch, FP32), expected)
    assert student.training
    with torch.no_grad():
        assert not torch.equal(logits_of(student, batch, FP32), expected)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_trains_is_lora_on_attention_and_the_new_parameters(name):
    student = make_trainable(converted(name), config())
    trainable = {n for n, p in student.named_parameters() if p.requires_grad}
    lora = {n for n in trainable if "lora_" in n}
    assert all(".linear_attention." in n for n in trainable - lora)
    assert trainable - lora
    assert not [n for n in lora if ".mlp." in n or "experts" in n or "linear_attention" in n]
    # q, k, v, o of four layers, or their fused counterparts, with two matrices each.
    assert len(lora) in (4 * 2 * 2, 4 * 4 * 2)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_checkpointing": True, "gradient_accumulation": 2, "attention_dropout": 0.05, "lora_dropout": 0.05},
        {"full": True, "learning_rate": 2e-3},
        {"temperature": 2.0, "ce_weight": 0.0},
    ],
    ids=["lora", "checkpointing-accumulation-dropout", "full", "temperature"],
)
def test_distillation_lowers_the_divergence(accelerator, corpus, run, options):
    model = converted()
    settings = config(24 * options.get("gradient_accumulation", 1), **options)
    teacher = tiny_model() if settings.full else None
    student = make_trainable(model, settings)
    before = divergence(accelerator, student, corpus, teacher)
    distill_logits(accelerator, student, corpus, settings, run, dtype=FP32, teacher=teacher)
    after = divergence(accelerator, student, corpus, teacher)
    assert after["kl"] < 0.9 * before["kl"]
    assert after["kl"] < after["window_only_kl"]
    assert after["teacher_ce"] == pytest.approx(before["teacher_ce"], rel=1e-6)
    records = [r for r in run.records() if r["stage"] == "logit_distillation"]
    assert [r["step"] for r in records] == list(range(1, 25))
    assert {"loss", "kl", "ce", "lr", "tokens", "tokens_per_second", "gradient_norm"} <= set(records[0])


def test_accumulation_is_a_larger_batch(accelerator, corpus, tmp_path, run):
    losses = []
    for options in ({"batch_size": 4}, {"batch_size": 2, "gradient_accumulation": 2}):
        student = make_trainable(converted(), config(4, **options))
        distill_logits(accelerator, student, corpus, config(4, **options), run, dtype=FP32)
        losses.append([r["loss"] for r in run.records()][-4:])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_merging_keeps_the_logits(accelerator, corpus, run):
    student = make_trainable(converted(), config())
    distill_logits(accelerator, student, corpus, config(), run, dtype=FP32)
    batch = stack_rows(corpus, [0], 64)
    student.eval()
    with torch.no_grad():
        expected = logits_of(student, batch, FP32)
        model = merged(student, FP32)
        torch.testing.assert_close(logits_of(model, batch, FP32), expected, rtol=1e-4, atol=1e-4)
    assert not [n for n, _ in model.named_parameters() if "lora" in n]
    assert not [n for n, p in model.named_parameters() if p.requires_grad]


def test_merging_into_bfloat16_keeps_new_parameters_in_float32():
    model = converted()
    model = merged(make_trainable(model.to(torch.bfloat16), config()), torch.bfloat16)
    dtypes = {n: p.dtype for n, p in model.named_parameters()}
    assert {d for n, d in dtypes.items() if "linear_attention" not in n} == {torch.bfloat16}
    assert {d for n, d in dtypes.items() if "linear_attention" in n} == {FP32}


def test_masters_are_float32_in_a_bfloat16_model():
    student = make_trainable(converted().to(torch.bfloat16), config())
    assert {p.dtype for p in student.parameters() if p.requires_grad} == {FP32}
    assert {p.dtype for p in student.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_attention_dropout_is_annealed_to_nothing(accelerator, corpus, run, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "hf_linattn.conversion.training_loop.set_attention_dropout", lambda model, p: seen.append(round(p, 6))
    )
    settings = config(4, attention_dropout=0.2)
    distill_logits(accelerator, make_trainable(converted(), settings), corpus, settings, run, dtype=FP32)
    assert seen == [0.2, 0.15, 0.1, 0.05]


def test_nan_stops_the_run_before_it_harms_the_weights(accelerator, corpus, run):
    student = make_trainable(converted(), config())
    with torch.no_grad():
        linear_attention_modules(student)[2].log_scale.fill_(float("nan"))
    lora = {n: p.clone() for n, p in student.named_parameters() if "lora_" in n}
    with pytest.raises(UserError, match=r"logit_distillation: step 1: the loss is nan.*lower learning_rate"):
        distill_logits(accelerator, student, corpus, config(), run, dtype=FP32)
    assert all(torch.equal(p, lora[n]) for n, p in student.named_parameters() if n in lora)


def test_unknown_target_modules_are_named():
    with pytest.raises(UserError, match=r"target_modules: \['qq_proj'\] are not linear layers.*'k_proj', 'o_proj'"):
        make_trainable(converted(), config(target_modules=("qq_proj",)))


def test_phases_spend_the_budget():
    settings = config(tokens=100_000, sequence_length=100, batch_size=8, long_sequence_length=400, long_fraction=0.2)
    assert training_phases(settings, 1) == [Phase(0, 100, 100, 8), Phase(100, 125, 400, 2)]
    assert training_phases(settings, 2) == [Phase(0, 50, 100, 8), Phase(50, 62, 400, 2)]
    assert training_phases(config(tokens=1), 1) == [Phase(0, 1, 64, 4)]
