"""A saved folder reloads as what it is, with the package, without it, or not at all: never silently as softmax."""

import json
import pathlib
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

from hf_linattn import LinearAttentionConfig, linear_attention_modules, linearize
from hf_linattn.remote_code import REMOTE_FILE, join_sources

FORMS = {
    "hedgehog": LinearAttentionConfig(window=4, softmax_layers=(0, 2), decay="scalar"),
    "performer": LinearAttentionConfig(feature_map="performer", window=4),
    "pure": LinearAttentionConfig(feature_map="identity", window=0, decay="fixed"),
}

# Runs in a process in which `import hf_linattn` fails, as on a machine without the package.
WITHOUT_PACKAGE = """
import sys
sys.modules["hf_linattn"] = None
import torch
from transformers import AutoModelForCausalLM
folder, logits_file, trust = sys.argv[1], sys.argv[2], sys.argv[3] == "trust"
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)
ids = torch.arange(3, 33).unsqueeze(0)
with torch.no_grad():
    assert torch.equal(model(ids, use_cache=False).logits, torch.load(logits_file)), "logits differ"
    tokens = model.generate(ids, max_new_tokens=4, do_sample=False).tolist()[0][-4:]
    print(type(model).__module__.split(".")[0], tokens)
    if len(sys.argv) > 4:
        model.save_pretrained(sys.argv[4])
"""


@pytest.fixture(params=list(FORMS))
def saved(request, tmp_path):
    model = linearize(tiny_model("llama"), FORMS[request.param])
    with torch.no_grad():
        for parameter in (p for m in linear_attention_modules(model).values() for p in m.parameters()):
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


def ids():
    return torch.arange(3, 33).unsqueeze(0)


def without_package(folder, *arguments, cwd):
    environment = {
        "HF_HOME": str(cwd / "hf"),
        "PATH": "",
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(cwd / "modules"),
    }
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGE, str(folder), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=cwd,
        timeout=240,
    )


@torch.no_grad()
def test_remote_code_without_the_package(saved, tmp_path):
    model, folder = saved
    torch.save(model(ids(), use_cache=False).logits, tmp_path / "logits.pt")
    again = tmp_path / "again"
    run = without_package(folder, tmp_path / "logits.pt", "trust", again, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    tokens = model.generate(ids(), max_new_tokens=4, do_sample=False).tolist()[0][-4:]
    assert run.stdout.split(maxsplit=1) == ["transformers_modules", f"{tokens}\n"]
    # What such a process saves is complete again, for the package too.
    assert (again / REMOTE_FILE).read_text() == (folder / REMOTE_FILE).read_text()
    reloaded = AutoModelForCausalLM.from_pretrained(again)
    assert torch.equal(reloaded(ids(), use_cache=False).logits, model(ids(), use_cache=False).logits)


def test_refused_without_package_and_trust(saved, tmp_path):
    _, folder = saved
    run = without_package(folder, "none", "no-trust", cwd=tmp_path)
    assert run.returncode != 0
    assert "trust_remote_code" in run.stderr


def test_package_wins_over_remote_code(saved):
    model, folder = saved
    reloaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(reloaded) is type(model)
    assert type(reloaded).__module__ == "hf_linattn.modeling"


def test_remote_file_is_this_package(saved):
    _, folder = saved
    assert (folder / REMOTE_FILE).read_text() == join_sources("hf_linattn.modeling")


def test_no_code_file_of_transformers_own(saved):
    _, folder = saved
    assert [p.name for p in folder.glob("*.py")] == [REMOTE_FILE]


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_strict_keys(saved, change):
    model, folder = saved
    path = folder / "model.safetensors"
    weights = load_file(path)
    key = next((k for k in weights if ".linear_attention." in k), None)
    if change == "missing":
        del weights[key]
    else:
        weights[key + "_old"] = weights[key].clone()
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="linear_attention"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_unknown_entry_of_the_block_is_refused(saved):
    _, folder = saved
    config = json.loads((folder / "config.json").read_text())
    config["linear_attention_config"]["widow"] = 4
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="widow.*did you mean 'window'"):
        AutoModelForCausalLM.from_pretrained(folder)


@torch.no_grad()
def test_sharded_and_tied(tmp_path):
    model = linearize(tiny_model("llama", tie_word_embeddings=True), FORMS["hedgehog"])
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert reloaded.lm_head.weight is reloaded.model.embed_tokens.weight
    assert torch.equal(reloaded(ids(), use_cache=False).logits, model(ids(), use_cache=False).logits)


@torch.no_grad()
def test_bf16_reload_keeps_the_new_parameters_in_fp32(tmp_path):
    model = linearize(tiny_model("llama", dtype=torch.bfloat16), FORMS["hedgehog"])
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    dtypes = {n: p.dtype for n, p in reloaded.named_parameters()}
    assert {d for n, d in dtypes.items() if ".linear_attention." in n} == {torch.float32}
    assert {d for n, d in dtypes.items() if ".linear_attention." not in n} == {torch.bfloat16}
    assert torch.equal(reloaded(ids(), use_cache=False).logits, model(ids(), use_cache=False).logits)


def test_checkpoint_of_a_softmax_model_is_not_mistaken(tmp_path):
    """A converted config over weights without feature maps must not load with untrained ones."""
    model = linearize(tiny_model("llama"), FORMS["hedgehog"])
    model.save_pretrained(tmp_path)
    plain = {k: v for k, v in load_file(tmp_path / "model.safetensors").items() if ".linear_attention." not in k}
    save_file(plain, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="linear_attention"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_joined_names_are_unique_and_imports_plain(tmp_path):
    package = pathlib.Path(__file__).parents[2] / "hf_linattn"
    assert package.is_dir()
    source = join_sources("hf_linattn.modeling")
    compile(source, REMOTE_FILE, "exec")
    assert source.count("hf_linattn.modeling import __getattr__") >= 1
