"""Losses of long texts against the plain formula, buckets, documents from files, refusals."""

import json
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_model, tiny_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode

import hf_linattn
from hf_linattn.errors import UserError
from hf_linattn.evals import scoring
from hf_linattn.evals.perplexity import corpus_perplexity, perplexity_by_position, position_buckets
from hf_linattn.evals.scoring import last_logits, token_losses
from hf_linattn.evals.text_files import read_documents

TEXT = "It is a long way from here to there, and longer still in the rain. "


def plain_losses(model, ids):
    with torch.no_grad():
        logits = model(ids[None], use_cache=False).logits[0].float()
    return F.cross_entropy(logits[:-1], ids[1:], reduction="none")


@pytest.mark.parametrize("single_forward", [1000, 0], ids=["one-pass", "through-cache"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "gpt2", "opt", "converted"])
def test_token_losses(name, single_forward, converted, monkeypatch):
    monkeypatch.setattr(scoring, "LOGIT_ROWS", 16)
    model = converted.model if name == "converted" else tiny_model(name)
    ids = torch.randint(3, 99, (75,), generator=torch.Generator().manual_seed(1))
    losses = token_losses(model, ids, single_forward=single_forward)
    torch.testing.assert_close(losses, plain_losses(model, ids), rtol=2e-5, atol=2e-5)


class _WidestLogits(TorchDispatchMode):
    """Records the most rows of a tensor whose last dimension is the vocabulary."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.ndim > 1 and out.shape[-1] == 128:
            self.rows = max(self.rows, out[..., 0].numel())
        return out


def test_no_logits_of_the_whole_text(monkeypatch):
    monkeypatch.setattr(scoring, "LOGIT_ROWS", 48)  # more than the 32 rows of the head's own weight
    model = tiny_model("llama")
    ids = torch.randint(3, 99, (200,))
    with _WidestLogits() as widest:
        token_losses(model, ids)
    assert widest.rows == 48


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "opt", "converted"])
def test_last_logits(name, converted):
    model = converted.model if name == "converted" else tiny_model(name)
    ids = torch.randint(3, 99, (2, 30))
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[:, -5:]
    torch.testing.assert_close(last_logits(model, ids, 5), expected, rtol=1e-5, atol=1e-5)


def test_position_buckets():
    assert position_buckets(8192) == [
        *((0, 64), (64, 256), (256, 512), (512, 1024)),
        *((1024, 2048), (2048, 4096), (4096, 8192)),
    ]
    assert position_buckets(16384)[-1] == (8192, 16384)
    assert position_buckets(300) == [(0, 64), (64, 256), (256, 300)]
    assert position_buckets(40) == [(0, 40)]


def test_perplexity_by_position(converted):
    documents = [TEXT * 8, "too short", TEXT[::-1] * 8, TEXT.upper() * 8]
    calls = []
    result = perplexity_by_position(
        converted.model,
        converted.tokenizer,
        documents,
        max_length=300,
        max_documents=2,
        progress=lambda done, total: calls.append((done, total)),
    )
    losses = torch.stack(
        [plain_losses(converted.model, torch.tensor(converted.tokenizer.encode(documents[i])[:300])) for i in (0, 2)]
    )
    assert list(result) == ["0-64", "64-256", "256-300"]
    for (first, end), value in zip(position_buckets(300), result.values(), strict=True):
        assert value == pytest.approx(math.exp(losses[:, first:end].mean()), rel=1e-4)
    assert calls == [(1, 2), (2, 2)]


@pytest.mark.parametrize("context", [300, 64, 33, 2])
def test_perplexity_from_a_bounded_context(converted, context):
    """Every token once, from `context` tokens at most, and from half of them at least."""
    document = TEXT * 8
    ids = torch.tensor(converted.tokenizer.encode(document)[:300])
    losses, first, step = torch.full((299,), torch.nan, dtype=torch.float64), 0, context // 2
    while losses.isnan().any():
        piece = plain_losses(converted.model, ids[first : first + context]).double()
        place = losses[first : first + context - 1]
        place.copy_(torch.where(place.isnan(), piece, place))
        first += step
    result = perplexity_by_position(converted.model, converted.tokenizer, [document], max_length=300, context=context)
    for (begin, end), value in zip(position_buckets(300), result.values(), strict=True):
        assert value == pytest.approx(math.exp(losses[begin:end].mean()), rel=1e-4)


def test_a_context_of_one_token_is_refused(converted):
    with pytest.raises(UserError, match="context: expected at least 2 tokens, got 1"):
        perplexity_by_position(converted.model, converted.tokenizer, [TEXT * 8], max_length=64, context=1)


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity(converted):
    model = tiny_model("llama")
    torch.nn.init.zeros_(model.lm_head.weight)
    result = perplexity_by_position(model, converted.tokenizer, [TEXT * 8], max_length=200)
    assert result == pytest.approx({"0-64": 128.0, "64-200": 128.0})


def test_the_control_forgets_what_has_left_the_window():
    model = hf_linattn.linearize(tiny_model("llama"), hf_linattn.LinearAttentionConfig(window=8)).eval()
    ids = torch.randint(3, 99, (60,), generator=torch.Generator().manual_seed(2))
    changed = ids.clone()
    changed[0] += 1
    # Four layers of eight keys reach 28 tokens back: the first token is out of sight from position 29 on.
    with hf_linattn.window_only(model):
        assert torch.equal(token_losses(model, ids)[29:], token_losses(model, changed)[29:])
    assert not torch.equal(token_losses(model, ids)[29:], token_losses(model, changed)[29:])


def test_corpus_perplexity(converted):
    documents = [TEXT * 3, "A short one.", TEXT]
    result = corpus_perplexity(converted.model, converted.tokenizer, documents, max_length=64)
    total, tokens = 0.0, 0
    for text in documents:
        ids = torch.tensor(converted.tokenizer.encode(text))
        for start in range(0, len(ids) - 1, 63):
            losses = plain_losses(converted.model, ids[start : start + 64])
            total, tokens = total + losses.sum().item(), tokens + len(losses)
        assert tokens
    assert result["tokens"] == tokens == sum(len(converted.tokenizer.encode(text)) - 1 for text in documents)
    assert result["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-5)
    size = sum(len(text.encode()) for text in documents)
    assert result["bits_per_byte"] == pytest.approx(total / math.log(2) / size, rel=1e-5)


def test_no_document_is_long_enough(converted):
    with pytest.raises(UserError, match=r"at least 512 tokens to fill the bucket 256-512, the longest has 67; lower"):
        perplexity_by_position(converted.model, converted.tokenizer, [TEXT, "x"], max_length=512)


@pytest.mark.parametrize("function", [perplexity_by_position, corpus_perplexity])
def test_longer_than_the_models_positions(function):
    model = tiny_model("llama", max_position_embeddings=256)
    with pytest.raises(UserError, match=r"max_length: expected at most 256 tokens, .*got 512; use lengths up to 256"):
        function(model, tiny_tokenizer(), [TEXT * 20], max_length=512)


def test_nothing_to_predict(converted):
    with pytest.raises(UserError, match="at least one of two tokens or more, got none"):
        corpus_perplexity(converted.model, converted.tokenizer, ["a"])


@pytest.fixture
def rows():
    return [{"text": "first", "source": "a"}, {"text": "second", "source": "b"}, {"text": "third", "source": "a"}]


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_read_documents(suffix, rows, tmp_path):
    path = tmp_path / f"documents.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert read_documents(path) == ["first", "second", "third"]
    assert read_documents(path, source="a") == ["first", "third"]
    with pytest.raises(UserError, match="got none of source 'c'"):
        read_documents(path, source="c")


def test_read_plain_text(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("one\n\ntwo", encoding="utf-8")
    assert read_documents(path) == ["one\n\ntwo"]
    with pytest.raises(UserError, match="a plain text file has no sources"):
        read_documents(path, source="a")


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_no_text_column(suffix, tmp_path):
    path = tmp_path / f"documents.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist([{"content": "x"}]), path)
    else:
        path.write_text('{"content": "x"}\n')
    with pytest.raises(UserError, match=r"expected a column 'text' in .*, got \['content'\]"):
        read_documents(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text"', "line 2 is not one"),
        ("a.jsonl", "[1, 2]\n", "got no columns"),
        ("a.jsonl", "", "expected documents in .*, got none"),
        ("a.parquet", "PAR1 broken off", "expected a readable parquet file"),
        ("absent.parquet", None, "no such file"),
    ],
    ids=["cut", "no-object", "empty", "no-parquet", "absent"],
)
def test_unreadable_documents(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read_documents(tmp_path / name)
