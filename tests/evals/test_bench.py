"""The benchmark runs on a CPU at small shapes and its outputs are well formed."""

import io
import json

import pytest
import torch
from rich.console import Console

from hf_linattn.evals.bench import ROW_FIELDS, plot_bench, print_bench, run_bench

SHAPES = [(1, 2, 64, 16), (1, 2, 128, 16), (1, 2, 64, 32)]


@pytest.fixture(scope="module")
def rows():
    return run_bench("cpu", torch.float32, SHAPES, runs=2)


def test_rows_are_complete(rows):
    assert [tuple(row) for row in rows] == [ROW_FIELDS] * len(rows)
    assert {(row["impl"], row["B"], row["H"], row["N"], row["D"]) for row in rows} == {
        (impl, *shape) for impl in ("chunked", "chunked-window", "sdpa") for shape in SHAPES
    }
    for row in rows:
        assert 0 < row["floor_fwd_ms"] < row["floor_fwd_bwd_ms"]
        assert row["fwd_ms"] > 0
        assert row["fwd_bwd_ms"] > 0
        assert row["extra_mib"] >= 0
    assert all(row["extra_mib"] > 0 for row in rows if row["impl"].startswith("chunked"))


def test_table_is_followed_by_one_line_of_json(rows):
    console = Console(file=io.StringIO(), width=160)
    print_bench(rows, console)
    lines = console.file.getvalue().splitlines()
    assert any("chunked-window" in line for line in lines[:-1])
    assert json.loads(lines[-1])["rows"] == rows


def test_plot_is_written(rows, tmp_path):
    plot_bench(rows, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_unknown_backend_is_named():
    with pytest.raises(ValueError, match=r"^backends: .*'fla2'"):
        run_bench("cpu", torch.float32, SHAPES, backends=["fla2"])
