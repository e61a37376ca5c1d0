"""The results file: one JSON per evaluation, rewritten whole after every finished part.

Keys: recipe, commit, date, tokens, seconds, peak_gib, seed (of the conversion), teacher / student / window_only
({task: {metric: value}}), ppl_by_position ({variant: {bucket: ppl}}), recall ({variant: {passkey / mqar: {length:
share}}}), command; besides them evaluation (settings, seconds per part, batch size, data splits) and environment.
"""

import contextlib
import json
import os
import subprocess
import tempfile
from pathlib import Path

from hf_linattn.errors import UserError


def write_results(path: str | Path, results: dict) -> None:
    """Writes `results` as JSON in one step: a kill leaves the earlier file or the new one, never half of one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=2)
            file.write("\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def read_results(path: str | Path) -> dict:
    """Reads a results file.

    Raises:
        UserError: no such file, or not a results file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"results: expected a JSON file of `hf-linattn eval`, got {path}; no such file")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"results: expected JSON in {path}, got a file that breaks off: {error}; remove it") from error
    if not isinstance(results, dict) or "evaluation" not in results:
        raise UserError(f"results: expected a JSON file of `hf-linattn eval`, {path} holds something else")
    return results


def check_same_settings(path: str | Path, found: dict, wanted: dict) -> None:
    """Refuses to mix parts that were scored differently.

    Raises:
        UserError: a setting of the file differs from the one asked for; names it and the remedy.
    """
    for name, value in wanted.items():
        if found.get(name) != value:
            raise UserError(
                f"reuse: {path} was scored with {name}={found.get(name)!r}, now {name}={value!r} is asked for; "
                "give the same setting, another output file, or score everything again without reuse"
            )


def checkout_commit() -> str | None:
    """The commit of the checkout this file belongs to, None for an installed package."""
    here = Path(__file__).resolve()
    git = ("git", "-C", str(here.parent))
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], check=True, capture_output=True)
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], check=True, capture_output=True, text=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip()
