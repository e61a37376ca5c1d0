"""load_model: what it accepts, and a clear refusal of what it cannot use."""

import gguf
import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer

from hf_linattn import loading
from hf_linattn.errors import UserError
from hf_linattn.loading import load_model, load_weights


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


def write_gguf(path, model):
    """A Llama model in GGUF's layout, with a byte-level vocabulary."""
    config, head_dim = model.config, model.config.head_dim
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*(chr(33 + i) for i in range(config.vocab_size - 1)), "!!"])
    writer.add_token_types([1] * config.vocab_size)
    writer.add_token_merges(["! !"])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        stem, _, suffix = name.rpartition(".")
        if "q_proj" in name or "k_proj" in name:
            # Rotary pairs lie side by side in this format, half a head apart in Transformers.
            weight = weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def test_a_gguf_file_is_parsed_once(tmp_path, monkeypatch):
    reads, reader = [], loading._GGUFReader
    monkeypatch.setattr(loading, "_GGUFReader", lambda path: reads.append(path.name) or reader(path))
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    ids = torch.randint(3, 128, (2, 9))
    models = [tiny_model("llama", seed=seed) for seed in (0, 1)]
    for count, model in enumerate(models, 1):
        # The second file takes the place of the first.
        write_gguf(tmp_path / "new", model)
        (tmp_path / "new").replace(tmp_path / "model.gguf")
        loaded, tokenizer = load_model(str(tmp_path))
        again = load_weights(str(tmp_path / "model.gguf"))
        assert reads == ["model.gguf"] * count
        for found in (loaded, again):
            torch.testing.assert_close(found(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
        assert tokenizer("ab")["input_ids"] == [64, 65]
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before
