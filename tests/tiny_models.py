"""Tiny random models of every supported architecture, built locally, and a tokenizer for them."""

import pathlib

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

COMMON = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

# What a type needs beside or instead of COMMON. "@" separates variants of one type.
SPECIFIC = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "mistral@sliding": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 12},
    "gemma3_text": {"head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 12},
    "phi": {},
    "phi3": {},
    "smollm3": {},
    "olmo2": {},
    "granite": {"attention_multiplier": 0.2, "logits_scaling": 2.0},
    "stablelm": {},
    "starcoder2": {},
    "gpt_neox": {},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 4, "n_positions": 512, "n_inner": 48},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
ARCHITECTURES = list(SPECIFIC)


def tiny_model(
    name: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides
) -> PreTrainedModel:
    """A random model of type `name` (hidden 32, 4 layers, 4 heads, 2 KV heads), in evaluation mode."""
    torch.manual_seed(seed)
    model_type = name.split("@")[0]
    values = COMMON | SPECIFIC[name] | overrides
    config = AutoConfig.for_model(model_type, **values)
    # Transformers 5.17 runs gemma2 with an sdpa that ignores its softcap; later ones refuse sdpa for it.
    attention = {"attn_implementation": "eager"} if model_type == "gemma2" else {}
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, **attention)
    with torch.no_grad():
        # At its default size attention hardly matters; wrong attention must show in the logits.
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in parameter_name and "wpe" not in parameter_name:
                parameter.normal_(0, 0.25)
    return model.eval()


def tiny_tokenizer(directory: str | pathlib.Path | None = None) -> PreTrainedTokenizerFast:
    """A byte-ish word tokenizer of 128 entries; saved into `directory` if given."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    characters = [chr(c) for c in range(32, 127)]
    specials = ["<pad>", "<s>", "</s>", "<unk>"]
    vocab = {token: i for i, token in enumerate(specials + characters)}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    if directory is not None:
        tokenizer.save_pretrained(directory)
    return tokenizer
