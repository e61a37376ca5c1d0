"""Text documents from a Hub dataset, a parquet, JSON lines or text file, or a folder of them, in a seeded order.

Order matters: files are often sorted by source, and a run stops reading when it has its tokens. A buffer bounded in
characters, from which documents are drawn at random, shuffles a small corpus wholly and a stream locally, in bounded
memory, and depends on nothing but the seed.
"""

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from hf_linattn.conversion.config import DataConfig
from hf_linattn.errors import UserError

SUFFIXES = (".parquet", ".jsonl", ".json", ".txt")
SHUFFLE_BUFFER_CHARACTERS = 256_000_000


def read_documents(config: DataConfig, seed: int) -> Iterator[str]:
    """Non-empty documents of `config.train`, shuffled by `seed`, at most `config.max_documents` of them.

    Raises:
        UserError: no such file or dataset, no text column (the columns there are get named), a broken line or file.
    """
    texts = (text for text in _read_source(config, seed) if text and not text.isspace())
    shuffled = shuffle_buffered(texts, seed, SHUFFLE_BUFFER_CHARACTERS)
    for count, text in enumerate(shuffled):
        if config.max_documents is not None and count >= config.max_documents:
            return
        yield text


def local_files(source: str) -> list[Path] | None:
    """Files behind a local `source`, or None when it can only be a Hub id.

    Raises:
        UserError: a path that does not exist, an unknown suffix, or a folder without a readable file.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        files = [p for p in sorted(path.rglob("*")) if p.suffix in SUFFIXES and p.is_file()]
        if not files:
            raise UserError(f"data: no {', '.join(SUFFIXES)} file in folder {path}")
        return files
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise UserError(f"data: expected a {', '.join(SUFFIXES)} file, got {path}; rename or convert it")
        return [path]
    if path.suffix in SUFFIXES or path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise UserError(f"data: no such file or folder: {path}")
    return None


def shuffle_buffered(texts: Iterable[str], seed: int, capacity: int) -> Iterator[str]:
    """Yield `texts` in random order from a buffer of at most `capacity` characters (and at least one text)."""
    rng = random.Random(seed)
    buffer: list[str] = []
    size = 0

    def draw() -> str:
        i = rng.randrange(len(buffer))
        buffer[i], buffer[-1] = buffer[-1], buffer[i]
        return buffer.pop()

    for text in texts:
        buffer.append(text)
        size += len(text)
        while size > capacity and len(buffer) > 1:
            drawn = draw()
            size -= len(drawn)
            yield drawn
    while buffer:
        yield draw()


def _read_source(config: DataConfig, seed: int) -> Iterator[str]:
    files = local_files(config.train)
    if files is None:
        yield from _read_hub(config, seed)
        return
    readers = {".parquet": _read_parquet, ".jsonl": _read_json_lines, ".json": _read_json, ".txt": _read_text}
    for path in files:
        try:
            yield from readers[path.suffix](path, config.text_column)
        except UnicodeDecodeError as error:
            raise UserError(f"data: {path} is not UTF-8 text ({error.reason} at byte {error.start})") from None


def _read_parquet(path: Path, text_column: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"data: {path} is no readable parquet file: {error}") from None
    if text_column not in file.schema_arrow.names:
        raise _no_column(path, text_column, file.schema_arrow.names)
    for batch in file.iter_batches(batch_size=256, columns=[text_column]):
        yield from (_text(value, path, text_column) for value in batch.column(0).to_pylist() if value is not None)


def _read_json_lines(path: Path, text_column: str) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _json_text(_parse_json(line, f"{path}, line {number}"), path, text_column)


def _read_json(path: Path, text_column: str) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        is_array = file.read(64).lstrip().startswith("[")
    if not is_array:
        yield from _read_json_lines(path, text_column)
        return
    for record in _parse_json(path.read_text(encoding="utf-8"), str(path)):
        yield _json_text(record, path, text_column)


def _read_text(path: Path, text_column: str) -> Iterator[str]:
    yield path.read_text(encoding="utf-8")


def _read_hub(config: DataConfig, seed: int) -> Iterator[str]:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        dataset = datasets.load_dataset(
            config.train, config.subset, split=config.split, streaming=config.streaming
        ).shuffle(seed=seed)
        for record in dataset:
            if config.text_column not in record:
                raise _no_column(config.train, config.text_column, record)
            yield _text(record[config.text_column], config.train, config.text_column)
    except (datasets.exceptions.DatasetsError, OfflineModeIsEnabled, HfHubHTTPError, ConnectionError) as error:
        raise UserError(
            f"data: cannot read the Hub dataset {config.train!r} ({str(error).strip().splitlines()[0]}); give a local "
            f"{', '.join(SUFFIXES)} file, or `self` to sample text from the model itself"
        ) from None
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"data: {config.train!r}, subset={config.subset!r}, split={config.split!r}: {error}") from None


def _parse_json(text: str, where: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"data: {where}: not valid JSON ({error.msg} at column {error.colno})") from None


def _json_text(record, path: Path, text_column: str) -> str:
    if isinstance(record, str):
        return record
    if not isinstance(record, dict):
        raise UserError(f"data: {path}: expected objects with a {text_column!r} key, got {type(record).__name__}")
    if text_column not in record:
        raise _no_column(path, text_column, record)
    return _text(record[text_column], path, text_column)


def _text(value, source, text_column: str) -> str:
    if not isinstance(value, str):
        raise UserError(
            f"data: {source}: column {text_column!r} holds {type(value).__name__}, expected text; "
            "name another with data.text_column"
        )
    return value


def _no_column(source, text_column: str, columns: Iterable[str]) -> UserError:
    return UserError(
        f"data: {source} has no column {text_column!r}; its columns: {', '.join(columns)}; "
        "choose one with data.text_column"
    )
