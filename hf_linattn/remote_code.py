"""The file that travels beside the weights, for `trust_remote_code=True` where this package is not installed.

It is this package: the modules that `modeling` needs, joined in import order into one file, with the imports between
them taken out. One source, no second copy to maintain. Joining needs two things of those modules: names unique across
them, and plain `from hf_linattn.x import name` for each other.
"""

import ast
import functools
import importlib
import pathlib

REMOTE_FILE = "modeling_hf_linattn.py"

_HEADER = '''"""hf_linattn: linear attention for a Transformers decoder, the code of this folder's weights.

Joined from the hf_linattn package at save time; the installed package, with its compiled kernels, is used instead
wherever it can be imported. Apache-2.0.
"""
'''

_FOOTER = """
try:  # the installed package answers for the classes when it is there
    from hf_linattn.modeling import __getattr__
except ImportError:
    pass
"""


def write_remote_code(directory: str | pathlib.Path) -> pathlib.Path:
    """Write `modeling_hf_linattn.py` into `directory` and return its path."""
    target = pathlib.Path(directory) / REMOTE_FILE
    own = pathlib.Path(__file__)
    # Running from such a file: it is already the joined source.
    source = own.read_text() if own.name == REMOTE_FILE else join_sources("hf_linattn.modeling")
    if own.resolve() != target.resolve():
        target.write_text(source)
    return target


@functools.cache
def join_sources(entry: str) -> str:
    """One file out of module `entry` and every hf_linattn module it imports, dependencies first.

    Raises:
        ValueError: a form of import between our modules that joining cannot take apart, or a name defined twice.
    """
    order: list[str] = []
    _visit(entry, order, set())
    parts, owner = [], {}
    for name in order:
        source = _module_source(name)
        tree = ast.parse(source)
        for defined in _defined_names(tree):
            if defined in owner:
                raise ValueError(
                    f"{name}: {defined!r} is also defined in {owner[defined]}; joined files need unique names"
                )
            owner[defined] = name
        body = _without_imports(source, tree, name)
        if body.strip():
            parts.append(f"# ---- {name} ----\n{body.strip()}\n")
    return "\n\n".join([_HEADER, *parts]) + _FOOTER


def _visit(name: str, order: list[str], seen: set[str]) -> None:
    if name in seen:
        return
    seen.add(name)
    for node in ast.walk(ast.parse(_module_source(name))):
        if isinstance(node, ast.ImportFrom) and _is_ours(node.module):
            _visit(node.module, order, seen)
    order.append(name)


def _module_source(name: str) -> str:
    return pathlib.Path(importlib.import_module(name).__file__).read_text()


def _is_ours(module: str | None) -> bool:
    return module is not None and module.split(".")[0] == "hf_linattn"


def _defined_names(tree: ast.Module) -> list[str]:
    names = []
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.append(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [t.id for t in targets if isinstance(t, ast.Name) and t.id != "__all__"]
    return names


def _without_imports(source: str, tree: ast.Module, name: str) -> str:
    """The module's text without its docstring, `__all__` and the imports of our own modules."""
    lines, drop = source.splitlines(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and any(_is_ours(alias.name) for alias in node.names):
            raise ValueError(f"{name}: line {node.lineno}: import our modules as `from hf_linattn.x import name`")
        if isinstance(node, ast.ImportFrom) and _is_ours(node.module):
            if any(alias.asname for alias in node.names):
                raise ValueError(f"{name}: line {node.lineno}: `import ... as` between our modules cannot be joined")
            drop.update(range(node.lineno, node.end_lineno + 1))
    docstring = tree.body and isinstance(tree.body[0], ast.Expr) and isinstance(tree.body[0].value, ast.Constant)
    if docstring:
        drop.update(range(1, tree.body[0].end_lineno + 1))
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(getattr(t, "id", None) == "__all__" for t in node.targets):
            drop.update(range(node.lineno, node.end_lineno + 1))
    return "\n".join(line for i, line in enumerate(lines, 1) if i not in drop)
