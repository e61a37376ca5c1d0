"""Output folders that appear whole or not at all: written beside their place, made durable, then renamed."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from torch import nn

from hf_linattn.conversion.run_state import sync_folder
from hf_linattn.errors import UserError, is_full_disk


def check_output(output: Path, *, overwrite: bool, source: str | None = None) -> None:
    """Refuse, before hours of work, an output folder that could not be written at the end.

    Args:
        output (`Path`): to be written.
        overwrite (`bool`): an existing folder may be replaced.
        source (`str`, *optional*): where the model comes from, which must be another place.

    Raises:
        UserError: see above.
    """
    if source is not None and Path(source).exists() and output.exists() and os.path.samefile(source, output):
        raise UserError(f"output: {output} is the model's own folder; name another one")
    if output.is_file():
        raise UserError(f"output: {output} is a file; expected a folder to create")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise UserError(f"output: {output} exists already; name another folder, or replace it with --overwrite")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output: cannot create {output.parent}: {error.strerror}") from None
    if not os.access(output.parent, os.W_OK):
        raise UserError(f"output: no permission to write in {output.parent}")


def check_disk_space(output: Path, model: nn.Module) -> None:
    """Raise UserError if the disk of `output` has no room for `model`, which is known before it is trained."""
    needed = sum(p.numel() * p.element_size() for p in model.parameters())
    free = shutil.disk_usage(output.parent).free
    if free < needed:
        raise UserError(
            f"output: {output.parent} has {free / 2**30:.1f} GiB free, the model needs {needed / 2**30:.1f} GiB; "
            "free some space or choose another output folder"
        )


def write_folder(output: Path, write: Callable[[Path], None]) -> None:
    """Fill a folder with `write(folder)` and put it at `output`, replacing what was there.

    Whatever fails, `output` is what it was before, and nothing half-written is left.

    Raises:
        UserError: the disk is full or not writable.
    """
    temporary = output.with_name(f".{output.name}.tmp-{os.getpid()}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write(temporary)
        sync_folder(temporary)
        _put_in_place(temporary, output)
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno is None and not is_full_disk(error):
            raise
        remedy = "free some space" if is_full_disk(error) else "check the folder's disk and permissions"
        raise UserError(
            f"output: cannot write {output}: {error}. What was there before is unchanged; {remedy} and run the same "
            "command with --resume, which continues from the last checkpoint"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put_in_place(temporary: Path, output: Path) -> None:
    if not output.exists():
        os.replace(temporary, output)
        return
    # A folder that is not empty cannot be renamed over; this leaves it out of its place for one system call.
    earlier = output.with_name(f".{output.name}.old-{os.getpid()}")
    os.replace(output, earlier)
    try:
        os.replace(temporary, output)
    except OSError:
        os.replace(earlier, output)
        raise
    shutil.rmtree(earlier, ignore_errors=True)
