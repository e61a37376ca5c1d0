"""Reading evaluation texts from parquet, JSON lines or plain text files."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from hf_linattn.errors import UserError

TEXT_COLUMN = "text"
SOURCE_COLUMN = "source"


def read_documents(path: str | Path, *, source: str | None = None) -> list[str]:
    """The documents of a file, in its order.

    Args:
        path (`str` or `Path`): `.parquet` or `.jsonl`/`.json` (one object a line) with a column `text`; any other file
            is one document of plain text.
        source (`str`, *optional*): keeps the rows whose column `source` has this value (classic-books, peps, ...).

    Returns:
        `list[str]`: at least one document.

    Raises:
        UserError: no such file, unreadable content, no column `text` or `source`, or no row left.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"text: expected a parquet, JSON lines or text file, got {path}; no such file")
    if path.suffix == ".parquet":
        rows = _parquet_rows(path, source)
    elif path.suffix in (".jsonl", ".json"):
        rows = _json_rows(path)
    elif source is not None:
        raise UserError(f"source: a plain text file has no sources, got source={source!r} for {path}; leave it out")
    else:
        rows = [{TEXT_COLUMN: path.read_text(encoding="utf-8")}]
    _check_columns(path, rows, source)
    documents = [row[TEXT_COLUMN] for row in rows if source is None or row[SOURCE_COLUMN] == source]
    if not documents:
        known = sorted({str(row[SOURCE_COLUMN]) for row in rows}) if source is not None else []
        raise UserError(f"text: expected documents in {path}, got none{_of_source(source, known)}")
    return documents


def _of_source(source: str | None, known: list[str]) -> str:
    return "" if source is None else f" of source {source!r}; the file has {', '.join(known) or 'no rows'}"


def _parquet_rows(path: Path, source: str | None) -> list[dict]:
    wanted = [TEXT_COLUMN] if source is None else [TEXT_COLUMN, SOURCE_COLUMN]
    try:
        columns = pq.read_schema(path).names
        _check_names(path, columns, wanted)
        return pq.read_table(path, columns=wanted).to_pylist()
    except pa.ArrowInvalid as error:
        raise UserError(f"text: expected a readable parquet file, got {path}: {error}; write it again") from error


def _json_rows(path: Path) -> list[dict]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise UserError(
                    f"text: expected one JSON object per line in {path}, line {number} is not one: {error}"
                ) from error
    return rows


def _check_columns(path: Path, rows: list[dict], source: str | None) -> None:
    wanted = [TEXT_COLUMN] if source is None else [TEXT_COLUMN, SOURCE_COLUMN]
    for row in rows:
        _check_names(path, list(row) if isinstance(row, dict) else [], wanted)


def _check_names(path: Path, columns: list[str], wanted: list[str]) -> None:
    for name in wanted:
        if name not in columns:
            raise UserError(
                f"text: expected a column {name!r} in {path}, got {columns or 'no columns'}; rename the column"
                + (" or leave source out" if name == SOURCE_COLUMN else " that holds the text")
            )
