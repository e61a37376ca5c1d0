"""From documents to training rows: tokenise, append the end-of-text token, join, cut into rows of equal length.

The corpus is one array of token ids plus the offsets at which documents begin, kept as .npy files that training maps
into memory. A row is a slice of it; `position_ids` restart at 0 where a document begins, which is how every layer is
told that attention ends there. Which rows make a batch is a pure function of (seed, step), so a resumed run sees what
the unbroken one would have seen.
"""

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_linattn.conversion.repeats import with_repeats
from hf_linattn.errors import UserError

IGNORED_TARGET = -100
# Documents tokenised together: enough to keep a tokenizer's threads busy, few enough not to read far past the need.
TOKENIZER_BATCH_DOCUMENTS, TOKENIZER_BATCH_CHARACTERS = 64, 2_000_000


class Batch(NamedTuple):
    """`input_ids`, `position_ids` and `targets`, int64 `[B, T]`.

    `targets[t]` is the token after `input_ids[t]`, or IGNORED_TARGET where the document, or the row, ends.
    """

    input_ids: Tensor
    position_ids: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Corpus:
    """Token ids of all documents, one after the other.

    Args:
        tokens: `[num_tokens]`, uint16 or uint32.
        starts: `[num_documents]` int64, ascending, offsets into `tokens` at which documents begin; the first is 0.
    """

    tokens: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def split(self, fraction: float, row_length: int) -> tuple["Corpus", "Corpus"]:
        """(training, held out): the last `fraction` of the tokens, in whole rows and at least one, is held out."""
        if fraction == 0:
            return self, Corpus(self.tokens[:0], self.starts[:0])
        rows = max(1, round(len(self) * fraction / row_length))
        cut = len(self) - rows * row_length
        if cut < row_length:
            raise UserError(
                f"data: {len(self):,} tokens are too few for one training row and one validation row of {row_length} "
                "tokens; give more text or lower sequence_length"
            )
        later = self.starts[self.starts > cut] - cut
        held_out = Corpus(self.tokens[cut:], np.concatenate([np.zeros(1, np.int64), later]))
        return Corpus(self.tokens[:cut], self.starts[self.starts < cut]), held_out


class RowSampler:
    """Batches of rows: every row once, in an order drawn from `seed`, then again in another order.

    Args:
        corpus (`Corpus`): what the rows are cut from.
        sequence_length (`int`): tokens per row.
        seed (`int`): of the order.
        repeat_fraction (`float`): share of the rows in which earlier spans come again (repeats.py).

    Raises:
        UserError: fewer tokens than one row.
    """

    def __init__(self, corpus: Corpus, sequence_length: int, seed: int, repeat_fraction: float = 0.0):
        self.corpus, self.sequence_length, self.seed = corpus, sequence_length, seed
        self.repeat_fraction = repeat_fraction
        self.num_rows = len(corpus) // sequence_length
        if self.num_rows == 0:
            raise UserError(
                f"data: {len(corpus):,} tokens are fewer than one row of sequence_length={sequence_length}; "
                "give more text or lower sequence_length"
            )
        self._order = functools.lru_cache(maxsize=2)(self._draw_order)

    def batch(self, first: int, batch_size: int) -> Batch:
        """Rows number `first` to `first + batch_size - 1` of the endless seeded sequence of rows."""
        numbers = range(first, first + batch_size)
        rows = [self._order(n // self.num_rows)[n % self.num_rows] for n in numbers]
        batch = stack_rows(self.corpus, rows, self.sequence_length)
        for i, n in enumerate(numbers):
            # Spread evenly, so that every batch has its share.
            if int((n + 1) * self.repeat_fraction) > int(n * self.repeat_fraction):
                _repeat_row(batch, i, np.random.default_rng((self.seed, n)))
        return batch

    def _draw_order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(self.num_rows)


def stack_rows(corpus: Corpus, rows: Iterable[int], sequence_length: int) -> Batch:
    """The named rows of `corpus`, row r being tokens [r * sequence_length, (r + 1) * sequence_length)."""
    first = np.asarray(list(rows), dtype=np.int64)[:, None] * sequence_length
    offsets = first + np.arange(sequence_length)
    document = np.searchsorted(corpus.starts, offsets, side="right") - 1
    # A row that opens inside a document starts afresh: what came before is not in the row.
    positions = offsets - np.maximum(corpus.starts[document], first)
    input_ids = torch.from_numpy(corpus.tokens[offsets].astype(np.int64))
    position_ids = torch.from_numpy(positions)
    targets = torch.full_like(input_ids, IGNORED_TARGET)
    follows = position_ids[:, 1:] != 0
    targets[:, :-1][follows] = input_ids[:, 1:][follows]
    return Batch(input_ids, position_ids, targets)


def _repeat_row(batch: Batch, row: int, rng: np.random.Generator) -> None:
    """Rewrites one row of `batch` as one document with repeats."""
    ids = torch.from_numpy(with_repeats(batch.input_ids[row].numpy(), rng))
    batch.input_ids[row] = ids
    batch.position_ids[row] = torch.arange(len(ids))
    batch.targets[row, :-1] = ids[1:]


def prepare_corpus(
    folder: Path, key: dict, documents: Callable[[], Iterable], tokenizer, min_tokens: int, *, is_main: bool = True
) -> Corpus:
    """The corpus of `documents`, from the cache in `folder` if one with the same `key` is there.

    Args:
        folder (`Path`): where caches are kept, one sub-folder per key.
        key (`dict`): all that decides the content (source, seed, tokenizer, number of tokens), JSON-ready.
        documents (`Callable`): called only without a cache; gives texts, or lists of token ids already drawn.
        tokenizer: of the model; its end-of-text token closes every document.
        min_tokens (`int`): reading stops at this many.
        is_main (`bool`): whether this process writes; the others must call after it has returned.

    Raises:
        UserError: no document at all.
    """
    target = folder / f"corpus-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]}"
    if is_main and not target.is_dir():
        _write_corpus(target, documents(), tokenizer, min_tokens)
    corpus = Corpus(np.load(target / "tokens.npy", mmap_mode="r"), np.load(target / "starts.npy"))
    return corpus


def tokenizer_fingerprint(tokenizer) -> str:
    """Digest of everything that decides a tokenizer's ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(f"{tokenizer.eos_token_id}|{content}".encode()).hexdigest()[:16]


def source_fingerprint(files: list[Path] | None, name: str) -> list:
    """What identifies a data source: its name on the Hub, or path, size and modification time of each file."""
    if files is None:
        return [name]
    return [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def _write_corpus(target: Path, documents: Iterable, tokenizer, min_tokens: int) -> None:
    dtype = np.uint16 if len(tokenizer) <= np.iinfo(np.uint16).max + 1 else np.uint32
    pieces, starts, total = [], [], 0
    for ids in _token_ids(documents, tokenizer):
        starts.append(total)
        pieces.append(np.asarray(ids, dtype=dtype))
        total += len(ids)
        if total >= min_tokens:
            break
    if not pieces:
        raise UserError("data: no text: every document is empty; check the file and data.text_column")
    temporary = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        np.save(temporary / "tokens.npy", np.concatenate(pieces))
        np.save(temporary / "starts.npy", np.asarray(starts, dtype=np.int64))
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _token_ids(documents: Iterable, tokenizer) -> Iterator[list[int]]:
    """Token ids of each document, closed by the end-of-text token; documents without a token are left out."""
    end = tokenizer.eos_token_id
    for texts in _tokenizer_batches(documents):
        drawn = [text for text in texts if not isinstance(text, str)]
        written = [text for text in texts if isinstance(text, str)]
        encoded = tokenizer(written, verbose=False)["input_ids"] if written else []
        for ids in [*drawn, *encoded]:
            if len(ids) == 0 or list(ids) == [end]:
                continue
            yield [*ids, end] if end is not None and ids[-1] != end else list(ids)


def _tokenizer_batches(documents: Iterable) -> Iterator[list]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if len(batch) == TOKENIZER_BATCH_DOCUMENTS or size >= TOKENIZER_BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
