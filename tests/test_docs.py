"""README and its companions name only what exists: paths, commands, options, names to import; and the example runs."""

import ast
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
import typer
from readme_results import filled_readme, results_block
from tiny_models import ARCHITECTURES, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

import hf_linattn
from hf_linattn.cli import app

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "kernels/README.md")
COMMANDS = typer.main.get_command(app)
NAMED_AS_FORBIDDEN = {"__init__.py", "utils.py"}
# Made by the first result that is committed.
RESULTS = {"evals/results", "evals/results/kernels"}
TOP_LEVEL = {"hf_linattn", "kernels", "conversion", "recipes", "evals", "tests", ".ci"}


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def fenced(text):
    """(language, content) of every fenced block."""
    pieces = re.split(r"^```(.*)\n", text, flags=re.MULTILINE)
    return list(zip(pieces[1::4], pieces[2::4], strict=True))


def blocks(text, language):
    return [content for tag, content in fenced(text) if tag == language]


def code_spans(text):
    """Inline code of the text outside fenced blocks."""
    prose = "".join(re.split(r"^```.*\n", text, flags=re.MULTILINE)[::2])
    return re.findall(r"`([^`\n]+)`", prose)


def our_commands():
    """(document, words) of every call of `hf-linattn` or `-m hf_linattn`."""
    for name in DOCUMENTS:
        for block in blocks(read(name), "bash"):
            for line in block.splitlines():
                words = shlex.split(line, comments=True)
                if words[:1] == ["hf-linattn"]:
                    yield name, words[1:]
                elif "hf_linattn" in words and words[0] in ("accelerate", "python"):
                    yield name, words[words.index("hf_linattn") + 1 :]
        for span in code_spans(read(name)):
            if span.startswith("hf-linattn "):
                yield name, shlex.split(span)[1:]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_linked_files_and_sections_exist(name):
    text = read(name)
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    titles = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    headings = {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles}
    for target in targets:
        path, _, anchor = target.partition("#")
        assert not path or (ROOT / name).parent.joinpath(path).exists(), f"{name} links to {target}"
        assert not anchor or path or anchor in headings, f"{name} links to the section {target}"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_named_paths_exist(name):
    """Inline code that looks like a path of this repository is one."""
    folder = (ROOT / name).parent
    for span in code_spans(read(name)):
        if re.fullmatch(r"[\w.-]+(/[\w.*-]+)+/?", span) and span.split("/")[0] in TOP_LEVEL and span not in RESULTS:
            assert list(ROOT.glob(span.rstrip("/"))), f"{name} names {span}"
        elif re.fullmatch(r"\w+\.(py|toml|txt|yaml)", span) and span not in NAMED_AS_FORBIDDEN:
            assert any((place / span).exists() for place in (ROOT, folder, folder / "python")), f"{name} names {span}"


def test_results_block_says_what_the_files_say():
    assert filled_readme() == read("README.md"), "run python tests/readme_results.py"


def test_results_block_is_made_from_a_results_file(tmp_path, monkeypatch):
    scores = {"teacher": 0.6, "student": 0.55, "window_only": 0.5}
    results = {variant: {"piqa": {"acc": x}, "sciq": {"acc": x}} for variant, x in scores.items()}
    results |= {
        "recipe": "quick",
        "tokens": 2_000_000,
        "seconds": 90.0,
        "commit": "abc",
        "date": "2026-01-02T03:04:05",
        "command": "hf-linattn convert",
        "ppl_by_position": {variant: {"0-64": 10.0, "64-256": 30 * x} for variant, x in scores.items()},
        "recall": {variant: {"passkey": {"128": 1.0, "256": x}} for variant, x in scores.items()},
        "evaluation": {"part_seconds": {}},
        "environment": {"device": "a GPU"},
    }
    path = tmp_path / "evals" / "results" / "quick" / "gpu.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(results))
    monkeypatch.setattr("readme_results.ROOT", tmp_path)
    block = results_block(path.parents[1])
    assert "| `quick` [1] | mean of the 2 tasks | 0.600 | 0.550 | 0.500 |" in block
    assert "|  | perplexity at 64-256 | 18.00 | 16.50 | 15.00 |" in block
    assert "|  | passkey at 256 | 0.600 | 0.550 | 0.500 |" in block
    assert "2.0M training tokens in 1.5 minutes" in block
    assert "(evals/results/quick/gpu.json)" in block
    # Another seed of the same day is averaged in; an older day is left out.
    again = results | {"seed": 1, "seconds": 110.0, "student": {"piqa": {"acc": 0.57}, "sciq": {"acc": 0.57}}}
    path.with_name("gpu-seed1.json").write_text(json.dumps(again))
    path.with_name("old.json").write_text(json.dumps(again | {"date": "2025-12-31T00:00:00"}))
    block = results_block(path.parents[1])
    assert "| `quick` [1] | mean of the 2 tasks | 0.600 ± 0.000 | 0.560 ± 0.010 | 0.500 ± 0.000 |" in block
    assert "in 1.7 minutes, 2 seeds" in block
    assert "gpu-seed1.json" in block
    assert "old.json" not in block


def test_repository_tree_lists_the_folders_that_exist():
    (tree,) = (block for block in blocks(read("README.md"), "") if block.startswith("hf_linattn/"))
    listed = {line.split("/")[0] for line in tree.splitlines()}
    assert listed == TOP_LEVEL - {".ci"}
    assert all((ROOT / folder).is_dir() for folder in listed)


def test_there_are_commands_to_check():
    assert {words[0] for _, words in our_commands()} >= set(COMMANDS.commands)


@pytest.mark.parametrize(("document", "words"), list(our_commands()), ids=lambda value: " ".join(value)[:60])
def test_commands_and_options_exist(document, words):
    command = COMMANDS.commands.get(words[0])
    assert command is not None, f"{document}: no command {words[0]!r}"
    known = {option for parameter in command.params for option in parameter.opts}
    for word in words[1:]:
        if word.startswith("-") and not word[1:2].isdigit():
            assert word.partition("=")[0] in known, f"{document}: `{words[0]}` has no option {word}"


def test_every_command_is_documented():
    text = read("README.md")
    for name in COMMANDS.commands:
        assert f"hf-linattn {name}" in text, f"README says nothing of `hf-linattn {name}`"


def test_settings_given_with_set_exist():
    from hf_linattn.conversion.config import load_finetune_config, load_recipe

    given = [
        (words[0], words[i + 1]) for _, words in our_commands() for i, word in enumerate(words) if word == "--set"
    ]
    assert given
    for command, setting in given:
        (load_recipe if command == "convert" else load_finetune_config)(overrides=[setting])


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))
    for name in DOCUMENTS:
        spans = code_spans(read(name)) + [line for block in blocks(read(name), "bash") for line in block.splitlines()]
        for span in spans:
            words = [word for word in span.split("#")[0].split() if "=" not in word]
            if words[:1] == ["make"] and len(words) == 2:
                assert words[1] in targets, f"{name} names {span}"


def test_environment_variables_are_ours_or_known():
    """The table lists every variable that the code reads under our prefix."""
    folders = TOP_LEVEL - {"tests", ".ci"}
    sources = [path.read_text("utf-8") for folder in folders for path in (ROOT / folder).rglob("*.py")]
    read_by_code = {name for source in sources for name in re.findall(r"HF_LINATTN_[A-Z_]+", source)}
    assert read_by_code == set(re.findall(r"HF_LINATTN_[A-Z_]+", read("README.md")))


def test_feature_maps_and_architectures_are_all_named():
    from hf_linattn.feature_maps import FEATURE_MAPS

    text = read("README.md")
    for name in FEATURE_MAPS:
        assert f"`{name}`" in text, f"README does not name the feature map {name}"
    for name in ARCHITECTURES:
        assert re.search(rf"\b{name.split('@')[0].removesuffix('_text')}\b", text), f"README does not name {name}"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_python_blocks_import_only_what_exists(name):
    for block in blocks(read(name), "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "hf_linattn":
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), f"{name}: {ast.unparse(node)}"
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "hf_linattn":
                assert hasattr(hf_linattn, node.attr), f"{name}: hf_linattn.{node.attr}"


@pytest.fixture
def out(tmp_path, monkeypatch):
    """The working folder of the examples: a converted model in `out`, and `my.jsonl`."""
    model = hf_linattn.linearize(tiny_model("llama"), hf_linattn.LinearAttentionConfig(window=8))
    model.save_pretrained(tmp_path / "out")
    tiny_tokenizer(tmp_path / "out")
    rows = [{"text": f"The fox number {i} jumps over the dogs."} for i in range(8)]
    (tmp_path / "my.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def test_first_example_runs(out, capsys):
    (block,) = (block for block in blocks(read("README.md"), "python") if ".generate(" in block)
    assert len(block.strip().splitlines()) <= 7
    exec(compile(block, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.strip()) > 0


def test_trainer_example_runs_and_its_result_reloads(out):
    block = read("README.md").split("<!-- example: trainer -->\n```python\n")[1].split("```")[0]
    exec(compile(block, "README.md", "exec"), {})
    reloaded = AutoModelForCausalLM.from_pretrained("tuned")
    assert sorted(hf_linattn.linear_attention_modules(reloaded)) == [0, 1, 2, 3]


def test_kernels_example_runs():
    (block,) = blocks(read("kernels/README.md"), "python")
    names = {}
    exec(compile(block, "kernels/README.md", "exec"), names)
    assert names["o"].shape == names["q"].shape
