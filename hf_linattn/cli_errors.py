"""The text that the command line shows instead of a traceback, for failures that a user can mend.

`explain` knows our own errors and those of the libraries that read and write for us. An exception that it does not
know is a defect of ours: it keeps its traceback.
"""

import os

import typer
from typer.core import TyperGroup

from hf_linattn.errors import UserError, is_full_disk

IS_MAIN_PROCESS = os.environ.get("RANK", "0") == "0"
"""In a run that torchrun or accelerate started several times over, only the first process prints."""

# (package, exception, what it means and what to do); the most derived exception first. Named as text, so that telling
# a message apart imports no library.
LIBRARY_ERRORS = (
    (
        "torch",
        "OutOfMemoryError",
        "the device ran out of memory: {}. Use a smaller batch, a shorter sequence or --device cpu.",
    ),
    (
        "safetensors",
        "SafetensorError",
        "a safetensors file could not be read: {}. It is truncated or damaged: compare its size with the original and "
        "copy or download it again.",
    ),
    (
        "huggingface_hub",
        "GatedRepoError",
        "{} The repository is gated: accept its terms on the Hub, then run `hf auth login`.",
    ),
    (
        "huggingface_hub",
        "RepositoryNotFoundError",
        "{} Check the spelling of the id; for a private repository run `hf auth login` first.",
    ),
    ("huggingface_hub", "HFValidationError", "{} Give a folder that exists or a Hub id of the form owner/name."),
    ("huggingface_hub", "HfHubHTTPError", "the Hugging Face Hub refused the request: {}"),
    (
        "datasets",
        "DatasetNotFoundError",
        "{} Check the id of the dataset, or name a local parquet, JSON lines or text file.",
    ),
)


class _ErrorsAsMessages:
    """Within: an exception that `explain` knows becomes its text on stderr and exit code 1; Ctrl-C exit code 130."""

    def __init__(self, debug: bool):
        self.debug = debug

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, traceback) -> None:
        if isinstance(error, KeyboardInterrupt):
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None
        message = None if error is None or self.debug else explain(error)
        if message is not None:
            # Every process says why it fails: the first may be well, and only waiting for the one that is not.
            where = "" if IS_MAIN_PROCESS else f"rank {os.environ['RANK']}: "
            typer.echo(f"{where}error: {message}", err=True)
            raise typer.Exit(1) from None


class CommandGroup(TyperGroup):
    """The commands, with `--debug` of the group showing tracebacks."""

    def invoke(self, ctx):
        with _ErrorsAsMessages(ctx.params.get("debug", False)):
            return super().invoke(ctx)


def explain(error: BaseException) -> str | None:
    """What happened and what to do about it, or None for an exception that no user can mend.

    Args:
        error (`BaseException`): what a command raised.
    """
    if isinstance(error, UserError):
        return str(error)
    if is_full_disk(error):
        path = getattr(error, "filename", None)
        return (
            f"no space left on the disk{f' while writing {path}' if path else ''}. What stood at the output path "
            "before is unchanged. Free some space or choose another output, then run the command again; --resume "
            "continues a training run from its last saved step."
        )
    kinds = {(kind.__module__.split(".")[0], kind.__name__) for kind in type(error).__mro__}
    for package, name, text in LIBRARY_ERRORS:
        if (package, name) in kinds:
            return text.format(_first_line(error))
    if isinstance(error, OSError):
        advice = "" if error.errno else " A model on the Hub needs network access; a local one is named by its folder."
        return _first_line(error) + advice
    return None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
