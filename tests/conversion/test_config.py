"""Recipes: every one parses, every mistake is named."""

from importlib import resources

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from hf_linattn.conversion.config import load_finetune_config, load_recipe, pick_recipe, recipe_names
from hf_linattn.errors import UserError

ACCELERATE_FILES = [p for p in resources.files("hf_linattn.recipes.accelerate").iterdir() if p.name.endswith(".yaml")]


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_parses_and_survives_a_round_trip(name, tmp_path):
    config = load_recipe(name)
    assert config.name == name
    assert config.description
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load_recipe(path) == config


def test_shipped_recipes_are_those_promised():
    promised = {"quick", "standard", "quality", "lolcats", "llama-3.2-1b", "qwen3-8b"}
    promised |= {"smollm2-135m", "smollm2-135m-pure"}
    assert promised == set(recipe_names())


@pytest.mark.parametrize("path", ACCELERATE_FILES, ids=lambda path: path.name)
def test_accelerate_config_loads_with_accelerates_own_loader(path):
    loaded = load_config_from_file(str(path))
    assert loaded.mixed_precision == "bf16"
    expected = {"single_gpu": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED"}
    assert str(loaded.distributed_type).removeprefix("DistributedType.") == expected[path.name.removesuffix(".yaml")]


def test_overrides_are_yaml_and_later_ones_win():
    config = load_recipe(None, ("transfer.tokens=5", "transfer.tokens=7", "distillation.target_modules=[q_proj]"))
    assert (config.name, config.transfer.tokens) == ("standard", 7)
    assert config.distillation.target_modules == ("q_proj",)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("transfer.tokns=1", r"standard.yaml: unknown key 'transfer.tokns'; did you mean 'transfer.tokens'"),
        ("trasnfer.tokens=1", r"unknown key 'trasnfer'; did you mean 'transfer'"),
        ("attention.windw=1", r"unknown key 'attention.windw'; did you mean 'attention.window'"),
        ("data.self_sampling.topp=1", r"did you mean 'data.self_sampling.top_p'"),
        ("transfer.tokens=many", r"transfer.tokens: .*integer.*got 'many'"),
        ("attention.window=-1", r"window: expected an integer >= 0 .*got -1"),
        ("distillation.temperature=0", r"distillation.temperature: .*greater than 0, got 0"),
        ("transfer=3", r"transfer: expected a mapping of tokens, .*got 3"),
        ("transfer", r"--set: expected section.key=value, got 'transfer'"),
        ("transfer.tokens.x=1", r"'tokens' is a value, not a section"),
        ("name.x=1", r"'name' is a value, not a section"),
        ("attention.softmax_layers=[1]", r"softmax_every: expected null when attention.softmax_layers"),
        ("distillation.long_sequence_length=1500", r"long_sequence_length: expected a multiple of .*1024.*got 1500"),
        ("transfer.schedule=cosin", r"transfer.schedule: .*'cosine'.*got 'cosin'"),
    ],
)
def test_mistakes_name_key_expectation_and_value(override, message):
    with pytest.raises(UserError, match=message):
        load_recipe("standard", ("transfer.tokens=1", override))


def test_a_misspelt_key_names_the_users_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("atention: {window: 3}\n")
    with pytest.raises(UserError, match=r"mine.yaml: unknown key 'atention'; did you mean 'attention'"):
        load_recipe(path)
    path.write_text("a: [\n")
    with pytest.raises(UserError, match=r"mine.yaml: not valid YAML"):
        load_recipe(path)
    with pytest.raises(UserError, match=r"no file .*other.yaml; shipped recipes: .*quick"):
        load_recipe(tmp_path / "other.yaml")
    with pytest.raises(UserError, match=r"unknown 'qick'; did you mean 'quick'"):
        load_recipe("qick")


def test_softmax_every_follows_the_depth():
    config = load_recipe(None, ("softmax_every=4",))
    assert config.attention_for(10).softmax_layers == (0, 4, 8)
    assert config.attention_for(30).softmax_layers == tuple(range(0, 30, 4))


def test_config_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        load_recipe().transfer.tokens = 3


def test_finetune_config_reads_file_and_overrides(tmp_path):
    path = tmp_path / "finetune.yaml"
    path.write_text("tokens: 10\nfull: true\n")
    config = load_finetune_config(path, ("tokens=20",))
    assert (config.tokens, config.full) == (20, True)
    with pytest.raises(UserError, match="did you mean 'learning_rate'"):
        load_finetune_config(None, ("learnin_rate=1",))


@pytest.mark.parametrize(
    ("parameters", "device", "model_type", "recipe"),
    [
        (1.35e8, "cpu", "llama", "quick"),
        (1.35e8, "cuda", "llama", "smollm2-135m"),
        (1.2e9, "cuda", "llama", "llama-3.2-1b"),
        (8.2e9, "cuda", "qwen3", "qwen3-8b"),
        (7e9, "cuda", "mistral", "standard"),
    ],
)
def test_pick_recipe(parameters, device, model_type, recipe):
    assert pick_recipe(int(parameters), device, model_type) == recipe
