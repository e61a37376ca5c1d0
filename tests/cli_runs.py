"""The command line inside a test: run it, convert a tiny model with it, read its refusals."""

from tiny_models import tiny_model, tiny_tokenizer
from typer.testing import CliRunner

from hf_linattn.cli import app

# A conversion of the tiny model in a few seconds.
SETTINGS = {
    "dtype": "float32",
    "attention.window": 16,
    "transfer.tokens": 256,
    "transfer.sequence_length": 64,
    "distillation.tokens": 256,
    "distillation.sequence_length": 64,
    "evaluation.tasks": "[]",
    "evaluation.recall_lengths": "[300]",
    "evaluation.recall_trials": 1,
    "evaluation.perplexity_length": 320,
}


def write_model(folder):
    """A folder with a tiny softmax model."""
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer(folder)
    return folder


def write_text(path):
    """A file with enough text to train the tiny model on."""
    path.write_text("\n\n".join(f"The fox number {i} jumps over {i * 7} lazy dogs." for i in range(200)))
    return path


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def overrides(**changed):
    settings = SETTINGS | {name.replace("__", "."): value for name, value in changed.items()}
    return [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]


def convert(model, output, data, *options, **changed):
    return run("convert", model, "-o", output, "--recipe", "quick", "--data", data, *overrides(**changed), *options)


def assert_refused(result, *words):
    """Exit code 1, the words in one message on stderr, no traceback."""
    assert result.exit_code == 1, result.output
    # CliRunner keeps the exception of a bug; a message ends as SystemExit.
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert "Traceback" not in result.output
    messages = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1, result.stderr
    for word in words:
        assert str(word) in messages[0]


def left_behind(folder):
    """Every file and folder in `folder`."""
    return sorted(path.name for path in folder.iterdir())
