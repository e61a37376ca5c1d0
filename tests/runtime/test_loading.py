"""load_model: what it accepts, and a clear refusal of what it cannot use."""

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer

from hf_linattn.errors import UserError
from hf_linattn.loading import load_model


@pytest.fixture
def folder(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer(tmp_path / "model")
    return tmp_path / "model"


@torch.no_grad()
def test_folder(folder):
    model, tokenizer = load_model(str(folder), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert tokenizer("ab").input_ids == [69, 70]


def test_missing_folder(tmp_path):
    with pytest.raises(UserError, match=r"there is no such folder; expected a Hub id"):
        load_model(str(tmp_path / "nothing"))


def test_folder_without_model(tmp_path):
    with pytest.raises(UserError, match=r"the folder has no config.json and no GGUF file either"):
        load_model(str(tmp_path))


def test_ambiguous_gguf(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"several GGUF files \(a.gguf, b.gguf\): name one with --gguf-file"):
        load_model(str(tmp_path))
    with pytest.raises(UserError, match="no file 'c.gguf'"):
        load_model(str(tmp_path), gguf_file="c.gguf")
    with pytest.raises(UserError, match="no such GGUF file"):
        load_model(str(tmp_path / "c.gguf"))


def test_truncated_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged or cut short"):
        load_model(str(folder))


def test_unknown_model_type(folder):
    config = (folder / "config.json").read_text().replace('"model_type": "llama"', '"model_type": "nonesuch"')
    (folder / "config.json").write_text(config)
    with pytest.raises(UserError, match="cannot be loaded as a causal language model: .*nonesuch"):
        load_model(str(folder))


def test_pickled_weights_are_not_read(folder):
    model = tiny_model("llama")
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        load_model(str(folder))
