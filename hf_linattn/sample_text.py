"""A text that every Python installation carries, for measuring perplexity where no file is given and no network is.

It is the language reference behind `help("topics")`: several hundred thousand characters of English and code, which no
training run of this package reads.
"""

import json
import platform
from pathlib import Path
from pydoc_data.topics import topics

# Tokenizers make about four characters of such text a token; a document that is too short would not be counted.
CHARACTERS_PER_TOKEN = 6


def write_sample_text(folder: str | Path, tokens: int) -> Path:
    """Write the reference as JSON lines, cut into documents of at least `tokens` tokens.

    Args:
        folder (`str` or `Path`): existing folder to write to.
        tokens (`int`): length each document is to have.

    Returns:
        `Path`: `python-<version>-topics.jsonl` in `folder`, one `{"text": ...}` a line.
    """
    text, size = "\n\n".join(topics[name] for name in sorted(topics)), tokens * CHARACTERS_PER_TOKEN
    documents = [text[start : start + size] for start in range(0, max(1, len(text) - size + 1), size)]
    version = ".".join(platform.python_version_tuple()[:2])
    path = Path(folder) / f"python-{version}-topics.jsonl"
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents), encoding="utf-8")
    return path
