"""The card says what was recorded, and nothing that was not."""

import copy

import pytest
from huggingface_hub import ModelCard

from hf_linattn.conversion.model_card import write_model_card

SUMMARY = {
    "name": "smollm2-linear",
    "command": "convert",
    "run": "0123",
    "model": "HuggingFaceTB/SmolLM2-135M",
    "recipe": "standard",
    "config": {},
    "tokens": 33_000_000,
    "seconds": 300.0,
    "peak_gib": 12.5,
    "seed": 0,
    "device": "a GPU",
    "stages": {
        "attention_transfer": {
            "first_loss": 0.5,
            "last_loss": 0.05,
            "steps": 488,
            "tokens": 8_000_000,
            "seconds": 90.0,
        }
    },
    "validation": {"attention_transfer": {"kl": 0.08, "ce": 3.4, "teacher_ce": 3.3, "window_only_kl": 0.93}},
    "num_layers": 30,
    "linear_attention": {"window": 64, "feature_map": "hedgehog", "softmax_layers": [0, 4]},
    "versions": {"torch": "2.13"},
}
RESULTS = {"student": {"piqa": {"acc": 0.64}, "lambada_openai": {"acc": 0.3, "ppl": 40.0}}, "teacher": {}}


def test_card_without_results(tmp_path):
    card = ModelCard.load(write_model_card(tmp_path, SUMMARY))
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M"
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert "linear-attention" in card.data.tags
    assert card.data.eval_results is None
    assert "28 of its 30 layers" in card.text
    assert "Not evaluated yet" in card.text
    assert "| attention transfer | 0.0800 | 0.9300 | 3.4000 | 3.3000 |" in card.text
    assert 'from_pretrained("smollm2-linear")' in card.text


def test_card_names_the_windows_of_single_layers(tmp_path):
    summary = copy.deepcopy(SUMMARY)
    assert "the last 64 keys keep" in ModelCard.load(write_model_card(tmp_path, summary)).text
    summary["linear_attention"]["layer_windows"] = {"12": 1024, "7": 1024, 3: 512}
    card = ModelCard.load(write_model_card(tmp_path, summary)).text
    assert "the last 64 keys (512 in layer 3; 1024 in layers 7, 12) keep exact softmax" in card


def test_card_with_results(tmp_path):
    path = write_model_card(
        tmp_path, SUMMARY, RESULTS, "| task | student |\n|---|---|\n| piqa | .640 |", ("plot.png",)
    )
    card = ModelCard.load(path)
    results = {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert results == {("piqa", "acc"): 0.64, ("lambada_openai", "acc"): 0.3, ("lambada_openai", "ppl"): 40.0}
    assert "| piqa | .640 |" in card.text
    assert "![plot.png](plot.png)" in card.text
    assert "Not evaluated yet" not in card.text


@pytest.mark.parametrize("window", [0, 64])
def test_a_local_model_without_softmax_layers_or_validation(tmp_path, window):
    summary = copy.deepcopy(SUMMARY) | {"model": "my-folder", "validation": {"finetuning": {"ce": 3.0}}}
    summary["linear_attention"] |= {"softmax_layers": [], "window": window}
    card = ModelCard.load(write_model_card(tmp_path, summary))
    assert card.data.base_model is None
    assert "all of its 30 layers" in card.text
    assert ("exact softmax" in card.text) == bool(window)
    assert "Divergence" not in card.text
