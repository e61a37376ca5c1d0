"""The import arrow kernels <- hf_linattn <- {conversion, evals}, read off the syntax trees, and the house rules.

Nothing is imported here: a wrong import is found even where it stands inside a function that no test calls.
"""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "hf_linattn": "hf_linattn",
    "hf_linattn.kernels": "kernels/python",
    "hf_linattn.conversion": "conversion",
    "hf_linattn.evals": "evals",
    "hf_linattn.recipes": "recipes",
}
UPPER_LAYERS = ("hf_linattn.conversion", "hf_linattn.evals", "hf_linattn.recipes")
COMMAND_LINE = ("cli", "cli_evaluation", "cli_search", "cli_errors", "cli_options")
MAX_LINES = 400


def imported_names(source, package):
    """Every module an import statement of `source` names, as (dotted name, line number, inside a function or not)."""
    names = []

    def visit(node, in_function):
        if isinstance(node, ast.Import):
            names.extend((alias.name, node.lineno, in_function) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, *([base] if base else [])])
            # `from hf_linattn import evals` names a sub-package too.
            names.extend((f"{base}.{alias.name}", node.lineno, in_function) for alias in node.names)
        in_function = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, in_function)

    visit(ast.parse(source), False)
    return names


def reaches(name, package):
    return name == package or name.startswith(package + ".")


def reaches_command_line(name):
    return any(reaches(name, f"hf_linattn.{module}") for module in COMMAND_LINE)


def violation(name, in_function, layer, module):
    """Why `module` of `layer` may not import `name`, or None."""
    top_level = name.split(".")[0]
    if layer == "hf_linattn.kernels":
        if reaches(name, "hf_linattn.kernels") or top_level == "torch" or top_level in sys.stdlib_module_names:
            return None
        return "the ops import torch, the standard library and nothing of ours"
    if layer == "hf_linattn":
        if any(reaches(name, upper) for upper in UPPER_LAYERS):
            if module in COMMAND_LINE:
                return None if in_function else "the command line imports the layers above lazily, inside functions"
            return "the runtime ships without conversion, evals and recipes"
        if reaches_command_line(name) and module not in (*COMMAND_LINE, "__main__"):
            return "the command line sees all; nothing sees the command line"
        return None
    if layer == "hf_linattn.recipes":
        return "recipes are data only"
    sibling = "hf_linattn.evals" if layer == "hf_linattn.conversion" else "hf_linattn.conversion"
    if reaches(name, sibling) or reaches_command_line(name):
        return f"{layer} stands beside {sibling}, below the command line"
    return None


def violations(source, layer, module, package=None):
    """`package` is where relative imports start: the layer itself, or the sub-package of it that holds the module."""
    found = []
    for name, line, in_function in imported_names(source, package or layer):
        reason = violation(name, in_function, layer, module)
        if reason:
            found.append(f"{package or layer}.{module}:{line} imports {name}: {reason}")
    return found


def python_files(folder):
    return sorted(path for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts)


@pytest.mark.parametrize("layer", FOLDERS)
def test_imports_point_one_way(layer):
    folder = ROOT / FOLDERS[layer]
    files = python_files(FOLDERS[layer])
    assert files, f"{FOLDERS[layer]} holds no Python file"
    found = []
    for path in files:
        package = ".".join([layer, *path.relative_to(folder).parent.parts])
        found += violations(path.read_text(encoding="utf-8"), layer, path.stem, package)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "layer", "module"),
    [
        ("import transformers", "hf_linattn.kernels", "chunked"),
        ("from hf_linattn.config import X", "hf_linattn.kernels", "chunked"),
        ("from .. import config", "hf_linattn.kernels", "chunked"),
        ("def f():\n    from hf_linattn.conversion import pipeline", "hf_linattn", "modeling"),
        ("from hf_linattn import evals", "hf_linattn", "attention"),
        ("from hf_linattn.conversion.pipeline import convert", "hf_linattn", "cli"),
        ("from hf_linattn.cli_errors import explain", "hf_linattn", "loading"),
        ("import hf_linattn.evals.run", "hf_linattn.conversion", "pipeline"),
        ("from hf_linattn.conversion import config", "hf_linattn.evals", "run"),
        ("import hf_linattn.cli", "hf_linattn.evals", "run"),
        ("import os", "hf_linattn.recipes", "__init__"),
    ],
)
def test_a_wrong_import_is_found(source, layer, module):
    assert len(violations(source, layer, module)) == 1


@pytest.mark.parametrize(
    ("source", "layer", "module"),
    [
        ("import math\nimport torch.nn.functional as F\nfrom . import dispatch", "hf_linattn.kernels", "chunked"),
        ("import transformers\nfrom hf_linattn.kernels import linear_attention", "hf_linattn", "attention"),
        ("def f():\n    from hf_linattn.conversion.pipeline import convert", "hf_linattn", "cli"),
        ("from hf_linattn.cli import main", "hf_linattn", "__main__"),
        ("from hf_linattn.loading import load_model", "hf_linattn.evals", "run"),
    ],
)
def test_a_right_import_passes(source, layer, module):
    assert violations(source, layer, module) == []


def test_kernels_folder_does_not_shadow_the_kernels_package():
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it hides Hugging Face's own `kernels` from transformers"


def test_tests_are_no_packages():
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_every_python_file_is_short_and_named_for_what_it_holds():
    files = [path for folder in [*FOLDERS.values(), "tests"] for path in python_files(folder)]
    too_long = [f"{path}: {lines}" for path in files if (lines := path.read_text("utf-8").count("\n")) > MAX_LINES]
    assert not too_long, f"over {MAX_LINES} lines, split by what the parts do: {too_long}"
    assert not [path for path in files if path.stem in {"utils", "util", "helpers", "misc", "common"}]
