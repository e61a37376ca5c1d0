"""Documents from every source, packing with resets, batches as a function of (seed, step), the mistakes users make."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_models import tiny_model, tiny_tokenizer

from hf_linattn.conversion.config import DataConfig, SelfSamplingConfig
from hf_linattn.conversion.data import IGNORED_TARGET, Corpus, RowSampler, prepare_corpus, stack_rows
from hf_linattn.conversion.documents import read_documents, shuffle_buffered
from hf_linattn.conversion.repeats import NEAREST_SOURCE, with_repeats
from hf_linattn.conversion.self_data import sample_documents
from hf_linattn.errors import UserError

TEXTS = ["first text", "second text", "third text"]


def write_parquet(path):
    pq.write_table(pa.table({"text": [*TEXTS, None, "  "], "source": ["s"] * 5}), path)


def write_json_lines(path):
    path.write_text("\n".join(json.dumps({"text": t, "n": 1}) for t in TEXTS) + "\n\n")


def write_json(path):
    path.write_text(json.dumps([{"text": t} for t in TEXTS]))


def write_text(path):
    path.write_text(TEXTS[0])


@pytest.mark.parametrize(
    ("name", "write", "expected"),
    [
        ("a.parquet", write_parquet, TEXTS),
        ("a.jsonl", write_json_lines, TEXTS),
        ("a.json", write_json, TEXTS),
        ("b.json", write_json_lines, TEXTS),
        ("a.txt", write_text, TEXTS[:1]),
    ],
)
def test_every_source_gives_its_texts(tmp_path, name, write, expected):
    write(tmp_path / name)
    assert sorted(read_documents(DataConfig(train=str(tmp_path / name)), seed=0)) == sorted(expected)


def test_a_folder_is_read_whole_and_in_the_order_of_the_seed(text_file):
    config = DataConfig(train=str(text_file))
    first, again, other = (list(read_documents(config, seed)) for seed in (0, 0, 1))
    assert len(first) == 60
    assert first == again
    assert first != other
    assert sorted(first) == sorted(other)
    limited = list(read_documents(DataConfig(train=str(text_file), max_documents=7), 0))
    assert limited == first[:7]


def test_shuffle_in_a_small_buffer_loses_nothing():
    texts = [str(i) * 10 for i in range(100)]
    shuffled = list(shuffle_buffered(texts, seed=0, capacity=200))
    assert sorted(shuffled) == sorted(texts)
    assert shuffled != texts


def bad_parquet(path):
    path.write_bytes(b"PAR1 but no more")


def wrong_column(path):
    pq.write_table(pa.table({"body": ["x"], "title": ["y"]}), path)


def number_column(path):
    pq.write_table(pa.table({"text": [1, 2]}), path)


def broken_line(path):
    path.write_text('{"text": "fine"}\n{"text": \n')


def other_key(path):
    path.write_text('{"body": "x", "id": 3}\n')


def latin_text(path):
    path.write_bytes("caf\xe9 au lait".encode("latin-1"))


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("missing.parquet", None, "no such file or folder: .*missing.parquet"),
        ("a.csv", lambda p: p.write_text("a,b"), "expected a .parquet, .jsonl, .json, .txt file, got .*a.csv"),
        ("a.parquet", bad_parquet, "a.parquet is no readable parquet file"),
        ("a.parquet", wrong_column, "no column 'text'; its columns: body, title; choose one with data.text_column"),
        ("a.parquet", number_column, "column 'text' holds int, expected text"),
        ("a.jsonl", broken_line, "a.jsonl, line 2: not valid JSON"),
        ("a.jsonl", other_key, "no column 'text'; its columns: body, id"),
        ("a.txt", latin_text, "a.txt is not UTF-8 text"),
    ],
)
def test_bad_data_is_named(tmp_path, name, write, message):
    if write:
        write(tmp_path / name)
    with pytest.raises(UserError, match=message):
        list(read_documents(DataConfig(train=str(tmp_path / name)), 0))


def test_an_empty_folder_and_empty_documents_are_named(tmp_path):
    with pytest.raises(UserError, match="no .parquet.* file in folder"):
        list(read_documents(DataConfig(train=str(tmp_path)), 0))
    with pytest.raises(UserError, match="every document is empty"):
        prepare_corpus(tmp_path, {}, lambda: iter([]), tiny_tokenizer(), 10)
    assert not list(tmp_path.iterdir())


def test_packing_joins_documents_and_resets_positions(tmp_path):
    tokenizer = tiny_tokenizer()
    corpus = prepare_corpus(tmp_path, {"k": 1}, lambda: iter(["ab", "cde", "f"]), tokenizer, 100)
    end = tokenizer.eos_token_id
    a, b, c, d, e, f = (tokenizer.vocab[x] for x in "abcdef")
    assert corpus.tokens.tolist() == [a, b, end, c, d, e, end, f, end]
    assert corpus.starts.tolist() == [0, 3, 7]
    assert corpus.tokens.dtype == np.uint16
    batch = stack_rows(corpus, [0, 1], 4)
    assert batch.input_ids.tolist() == [[a, b, end, c], [d, e, end, f]]
    # The second row opens inside a document: what came before is not in the row, so its positions start at 0.
    assert batch.position_ids.tolist() == [[0, 1, 2, 0], [0, 1, 2, 0]]
    nothing = IGNORED_TARGET
    assert batch.targets.tolist() == [[b, end, nothing, nothing], [e, end, nothing, nothing]]


def test_the_corpus_is_cached_by_its_key(tmp_path):
    tokenizer = tiny_tokenizer()
    first = prepare_corpus(tmp_path, {"k": 1}, lambda: iter(["abc"]), tokenizer, 100)
    cached = prepare_corpus(tmp_path, {"k": 1}, lambda: pytest.fail("read again"), tokenizer, 100)
    assert first.tokens.tolist() == cached.tokens.tolist()
    other = prepare_corpus(tmp_path, {"k": 2}, lambda: iter(["abcd"]), tokenizer, 100)
    assert len(other) == 5


def test_reading_stops_when_there_are_tokens_enough(tmp_path):
    def endless():
        while True:
            yield "abcd" * 25

    assert 1000 <= len(prepare_corpus(tmp_path, {}, endless, tiny_tokenizer(), 1000)) < 1200


def test_batches_are_a_function_of_seed_and_step(corpus):
    sampler, same, other = RowSampler(corpus, 64, 5), RowSampler(corpus, 64, 5), RowSampler(corpus, 64, 6)
    assert (sampler.batch(40, 4).input_ids == same.batch(40, 4).input_ids).all()
    assert (sampler.batch(40, 4).input_ids != other.batch(40, 4).input_ids).any()
    # Two batches of two rows are one of four: processes and micro-batches see the rows one process would.
    joined = sampler.batch(40, 4).input_ids
    assert (joined[:2] == sampler.batch(40, 2).input_ids).all()
    assert (joined[2:] == sampler.batch(42, 2).input_ids).all()


def test_an_epoch_takes_every_row_once_and_the_next_in_another_order(corpus):
    sampler = RowSampler(corpus, 1000, 0)
    rows = [[tuple(r) for r in sampler.batch(first, 20).input_ids.tolist()] for first in (0, 20)]
    assert sampler.num_rows == 20
    assert len(set(rows[0])) == 20
    assert set(rows[0]) == set(rows[1])
    assert rows[0] != rows[1]


def test_split_holds_out_whole_rows_that_training_never_sees(corpus):
    training, held_out = corpus.split(0.1, 64)
    assert len(training) + len(held_out) == len(corpus)
    assert len(held_out) == 31 * 64
    assert held_out.starts[0] == 0
    assert np.array_equal(np.concatenate([training.tokens, held_out.tokens]), corpus.tokens)
    boundaries = set(training.starts) | {start + len(training) for start in held_out.starts[1:]}
    assert boundaries | {len(training)} == set(corpus.starts) | {len(training)}


def test_too_few_tokens_are_named():
    few = Corpus(np.arange(10, dtype=np.uint16), np.zeros(1, np.int64))
    with pytest.raises(UserError, match="10 tokens are fewer than one row of sequence_length=64"):
        RowSampler(few, 64, 0)
    with pytest.raises(UserError, match="too few for one training row and one validation row of 8"):
        few.split(0.1, 8)


def test_self_sampling_is_seeded_and_leaves_the_model_as_it_was():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    options = {"tokens": 500, "sequence_length": 40}

    def sample(seed):
        return list(sample_documents(model, tokenizer, SelfSamplingConfig(batch_size=8), seed=seed, **options))

    documents = sample(0)
    assert documents == sample(0)
    assert documents != sample(1)
    assert sum(map(len, documents)) >= 500
    assert all(len(document) <= 40 for document in documents)
    assert not model.training


def test_self_sampling_needs_a_token_to_start_from():
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(UserError, match="neither a beginning- nor an end-of-text token"):
        next(sample_documents(tiny_model(), tokenizer, SelfSamplingConfig(), tokens=9, sequence_length=20, seed=0))


@pytest.mark.parametrize("length", [1, 2, 9, 64, 2000])
def test_rows_with_repeats_copy_from_before(length):
    ids = np.arange(length, dtype=np.uint16)
    row = with_repeats(ids, np.random.default_rng(0))
    assert row.shape == ids.shape
    assert row.dtype == ids.dtype
    copied = np.flatnonzero(row != ids)
    assert (row[copied] < ids[copied]).all()
    assert np.array_equal(row, with_repeats(ids, np.random.default_rng(0)))
    if length == 2000:
        assert 0.2 < len(copied) / length < 0.8
        # A copied token is where it was first seen, or a copy of one: distances never fall below the nearest source.
        assert (ids[copied] - row[copied])[copied > NEAREST_SOURCE * 8].min() >= NEAREST_SOURCE


def test_the_share_of_rows_with_repeats_is_kept_in_every_batch():
    corpus = Corpus(np.arange(4000, dtype=np.uint16), np.asarray([0, 30, 700, 2500]))
    plain, mixed = RowSampler(corpus, 100, seed=0), RowSampler(corpus, 100, seed=0, repeat_fraction=0.25)
    for first in (0, 4, 8):
        a, b = plain.batch(first, 4), mixed.batch(first, 4)
        changed = [i for i in range(4) if not np.array_equal(a.input_ids[i], b.input_ids[i])]
        assert changed == [3]
        assert b.position_ids[3].tolist() == list(range(100))
        assert b.targets[3].tolist() == [*b.input_ids[3, 1:].tolist(), IGNORED_TARGET]
        assert all(np.array_equal(x[:3], y[:3]) for x, y in zip(a, b, strict=True))
