"""A tiny saved model, a text, a corpus and a run: what most tests of conversion start from."""

import random

import numpy as np
import pytest
from accelerate import Accelerator
from tiny_models import tiny_model, tiny_tokenizer

from hf_linattn.conversion.config import load_recipe
from hf_linattn.conversion.data import Corpus
from hf_linattn.conversion.run_state import RunState

TINY_RECIPE = (
    "attention.window=8",
    "transfer.tokens=2048",
    "transfer.sequence_length=64",
    "transfer.batch_size=4",
    "distillation.tokens=2048",
    "distillation.sequence_length=64",
    "distillation.batch_size=4",
    "distillation.long_sequence_length=null",
    "data.validation_rows=2",
    "data.validation_fraction=0.02",
    "checkpoint_every=3",
    "dtype=float32",
)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """Sixty short documents of words drawn from a small vocabulary."""
    rng = random.Random(0)
    words = ["linear", "softmax", "window", "state", "the", "of", "a", "far", "key", "query"]
    folder = tmp_path_factory.mktemp("texts")
    for i in range(60):
        (folder / f"{i:02}.txt").write_text(" ".join(rng.choice(words) for _ in range(rng.randint(5, 80))))
    return folder


@pytest.fixture(scope="session")
def tiny_recipe():
    def build(*overrides):
        return load_recipe("standard", (*TINY_RECIPE, *overrides))

    return build


@pytest.fixture(scope="session")
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture
def run(tmp_path, accelerator):
    return RunState(tmp_path / "state", {"what": "test"}, accelerator, resume=False)


@pytest.fixture(scope="session")
def corpus():
    """20,000 random tokens in 150 documents."""
    rng = np.random.default_rng(0)
    starts = np.sort(rng.choice(np.arange(1, 20_000), 149, replace=False))
    return Corpus(rng.integers(3, 128, 20_000).astype(np.uint16), np.concatenate([[0], starts]).astype(np.int64))
