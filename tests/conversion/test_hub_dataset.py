"""Reading a dataset from the Hub, with the network call replaced by a local file read through `datasets` itself."""

import json

import datasets
import pytest

from hf_linattn.conversion.config import DataConfig
from hf_linattn.conversion.documents import read_documents
from hf_linattn.errors import UserError

LOAD = datasets.load_dataset


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """`owner/name`, subset `small`, as `datasets` would stream it."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"document {i}", "id": i}) + "\n" for i in range(50)))
    calls = []

    def load_dataset(path, name=None, *, split, streaming):
        calls.append((path, name, split, streaming))
        return LOAD("json", data_files={"train": str(rows)}, split=split, streaming=streaming, cache_dir=str(tmp_path))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def config(**values):
    return DataConfig(**{"train": "owner/name", "subset": "small"} | values)


@pytest.mark.parametrize("streaming", [True, False])
def test_documents_in_an_order_that_the_seed_decides(hub, streaming):
    first, again, other = (list(read_documents(config(streaming=streaming), seed)) for seed in (0, 0, 1))
    assert hub[0] == ("owner/name", "small", "train", streaming)
    assert first == again
    assert first != other
    assert sorted(first) == sorted(other) == sorted(f"document {i}" for i in range(50))


def test_max_documents(hub):
    assert len(list(read_documents(config(max_documents=7), 0))) == 7


def test_missing_column_names_the_columns_there_are(hub):
    with pytest.raises(UserError, match=r"'body'.*text.*id"):
        next(read_documents(config(text_column="body"), 0))


def test_unreachable_hub_names_the_alternatives(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"cannot read the Hub dataset 'owner/name' .*`self`"):
        next(read_documents(config(), 0))
