"""The benchmark runs on a CPU at small shapes, its numbers follow from each other, its outputs are well formed."""

import io
import json
import math

import pytest
import torch
from readme_results import kernel_results_block
from rich.console import Console

from hf_linattn.errors import UserError
from hf_linattn.evals.bench import DECODE_FIELDS, ERROR_FIELDS, ROW_FIELDS, collect
from hf_linattn.evals.bench import run_suite as measured_rows
from hf_linattn.evals.bench_entries import Shape, bench_entries, minimal_flop
from hf_linattn.evals.bench_report import plot_bench, plot_results, print_bench, write_bench
from hf_linattn.evals.bench_suites import SUITES, timing_suite
from hf_linattn.evals.bench_timing import time_call

CPU, BANDWIDTH = torch.device("cpu"), 1e10
SHAPES = [Shape(1, 2, 64, 16), Shape(1, 2, 128, 16), Shape(1, 2, 64, 32)]


def run_suite(*args, **options) -> dict[str, list[dict]]:
    return collect(measured_rows(*args, **options))


@pytest.fixture(scope="module")
def results():
    return run_suite("bars", CPU, torch.float32, shapes=SHAPES, runs=2, bandwidth=BANDWIDTH)


@pytest.fixture(scope="module")
def rows(results):
    return results["rows"]


def facts(**changes):
    values = {"device": "cpu", "copy_gbs": 10.0, "torch": "2", "peers": {}, "date": "2026-01-02", "commit": "abc"}
    return values | {"suite": "bars", "command": "hf-linattn bench"} | changes


def test_rows_are_complete(rows):
    assert [tuple(row) for row in rows] == [ROW_FIELDS] * len(rows)
    assert {(row["impl"], *(row[name] for name in "BHND")) for row in rows} == {
        (impl, *shape) for impl in ("chunked", "chunked-window", "sdpa", "separation") for shape in SHAPES
    }
    assert all(row["extra_mib"] > 0 for row in rows if row["impl"].startswith("chunked"))


def test_rates_follow_from_times(rows):
    for row in rows:
        shape = Shape(*(row[name] for name in "BHND"))
        tensor_ms = math.prod(shape) * 4 / BANDWIDTH * 1e3
        moved = (6, 18) if row["impl"] == "chunked-window" else (4, 12)
        for kind, tensors, flop in zip(("fwd", "fwd_bwd"), moved, minimal_flop(row["op"], shape), strict=True):
            ms = row[f"{kind}_ms"]
            assert 0 < row[f"{kind}_p10_ms"] <= ms <= row[f"{kind}_p90_ms"]
            assert row[f"floor_{kind}_ms"] == pytest.approx(tensors * tensor_ms, rel=1e-3)
            assert row[f"{kind}_copy_share"] == pytest.approx(tensors * tensor_ms / ms, rel=1e-3)
            assert row[f"{kind}_gbs"] == pytest.approx(tensors * math.prod(shape) * 4 / ms / 1e6, rel=1e-3)
            assert row[f"{kind}_tflops"] == pytest.approx(flop / ms / 1e9, rel=1e-3)


def test_minimal_flop_of_one_head():
    assert minimal_flop("linear_attention", Shape(1, 1, 10, 4)) == (4 * 10 * 16, 14 * 10 * 16)
    assert minimal_flop("softmax_attention", Shape(1, 1, 10, 4)) == (2 * 100 * 4, 7 * 100 * 4)
    # Ten tokens see 1 to 10 keys of a window of 64; of a hundred, the first 64 see 1 to 64 and the others 64 each.
    assert minimal_flop("window_linear_attention", Shape(1, 1, 10, 4)) == (4 * 55 * 4, 14 * 55 * 4)
    work = (64 * 65 // 2 + 36 * 64) * 4 + 36 * 16
    assert minimal_flop("window_linear_attention", Shape(2, 3, 100, 4)) == (6 * 4 * work, 6 * 14 * work)


def test_the_implementations_of_one_form_agree():
    shape = Shape(1, 2, 64, 16)
    entries = {entry.impl: entry for entry in bench_entries(CPU, torch.float32)}
    q, k, v = (torch.rand(1, 64, 2, 16) for _ in range(3))
    chunked = entries["chunked"].call(q, k, v)
    separation = entries["separation"]
    assert separation.heads_first
    assert separation.fits(shape, torch.float32, CPU)
    assert not separation.fits(Shape(32, 16, 300_000, 32), torch.float32, CPU)
    other = separation.call(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    torch.testing.assert_close(chunked, other)


def test_tables_are_followed_by_one_line_of_json(results):
    console = Console(file=io.StringIO(), width=200)
    print_bench(results, console)
    lines = console.file.getvalue().splitlines()
    assert any("chunked-window" in line for line in lines[:-1])
    assert json.loads(lines[-1]) == results


def test_decode_and_errors():
    decode = run_suite("decode", CPU, torch.float32, runs=2, bandwidth=BANDWIDTH)["decode"]
    assert {tuple(row) for row in decode} == {DECODE_FIELDS}
    for row in decode:
        assert row["floor_us"] == pytest.approx(
            2 * row["B"] * row["H"] * row["D"] ** 2 * 4 / BANDWIDTH * 1e6, rel=1e-3
        )
        assert row["us"] > 0
    (row,) = run_suite("errors", CPU, torch.bfloat16, runs=2, bandwidth=BANDWIDTH)["errors"]
    assert tuple(row) == ERROR_FIELDS
    assert row["impl"] == "chunked"
    assert all(0 < row[name] < 0.3 for name in ("o", "dq", "dk", "dv"))
    console = Console(file=io.StringIO(), width=200)
    print_bench({"decode": decode, "errors": [row]}, console)
    assert "Decode step" in console.file.getvalue()


@pytest.mark.parametrize("suite", ["sweep", "paper"])
def test_suites_give_plots(suite, tmp_path):
    rows = run_suite(suite, CPU, torch.float32, runs=1, bandwidth=BANDWIDTH)["rows"]
    assert {row["suite"] for row in rows} == {suite}
    assert plot_bench(rows, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert not plot_bench(rows[:1], tmp_path / "none.png")


def test_suites_of_a_gpu():
    assert {len(timing_suite(name, "cuda").shapes) for name in ("bars", "sweep", "paper")} == {6, 16, 12}
    sweep = timing_suite("sweep", "cuda").shapes
    assert {shape.B * shape.N for shape in sweep} == {2**17}
    assert {shape.N for shape in sweep} == {2**power for power in range(10, 18)}
    assert set(SUITES) == {"bars", "sweep", "paper", "decode", "errors"}


def test_rows_are_added_to_the_results_file(tmp_path, results):
    path = tmp_path / "evals" / "results" / "kernels" / "cpu.json"
    errors = run_suite("errors", CPU, torch.float32, runs=1, bandwidth=BANDWIDTH)
    write_bench(path, facts(), results)
    write_bench(path, facts(date="2026-01-03", suite="errors", commit="def"), errors)
    again = [row | {"fwd_ms": 7.0} for row in results["rows"][:4]]
    write_bench(path, facts(date="2026-01-04", commit="ghi"), {"rows": again})
    written = json.loads(path.read_text())
    assert written["rows"] == [row | {"run": "2026-01-04"} for row in again] + [
        row | {"run": "2026-01-02"} for row in results["rows"][4:]
    ]
    assert written["errors"] == [row | {"run": "2026-01-03"} for row in errors["errors"]]
    assert {date: run["commit"] for date, run in written["runs"].items()} == {
        "2026-01-02": "abc",
        "2026-01-03": "def",
        "2026-01-04": "ghi",
    }
    assert [x.name for x in plot_results(path)] == ["cpu-bars.png"]
    with pytest.raises(UserError, match="device"):
        write_bench(path, facts(device="another"), errors)


def test_a_run_without_rows_is_forgotten(tmp_path, results):
    for date in ("2026-01-02", "2026-01-03"):
        write_bench(tmp_path / "cpu.json", facts(date=date), results)
    assert set(json.loads((tmp_path / "cpu.json").read_text())["runs"]) == {"2026-01-03"}


def test_unknown_backend_is_named():
    with pytest.raises(ValueError, match=r"^backends: .*'fla2'"):
        run_suite("bars", CPU, torch.float32, shapes=SHAPES, backends=["fla2"], bandwidth=BANDWIDTH)


def test_implementations_can_be_chosen_and_skipped():
    def impls(**options) -> set[str]:
        found = run_suite("bars", CPU, torch.float32, shapes=SHAPES[:1], runs=1, bandwidth=BANDWIDTH, **options)
        return {row["impl"] for row in found["rows"]}

    assert impls(backends=["chunked", "separation"]) == {"chunked", "separation"}
    assert impls(skip=["chunked"]) == {"sdpa", "separation"}


def test_what_fails_leaves_an_empty_row(monkeypatch, capsys):
    def fails(q, k, v):
        raise RuntimeError("no kernel\nfor this")

    entry = bench_entries(CPU, torch.float32)[0]._replace(impl="broken", call=fails)
    monkeypatch.setattr("hf_linattn.evals.bench.bench_entries", lambda device, dtype: [entry])
    (row,) = run_suite("bars", CPU, torch.float32, shapes=SHAPES[:1], bandwidth=BANDWIDTH)["rows"]
    assert row["fwd_ms"] is row["fwd_bwd_ms"] is row["fwd_tflops"] is None
    assert "broken (1, 2, 64, 16): no kernel" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_measured():
    gpu = torch.device("cuda")
    rows = run_suite("bars", gpu, torch.bfloat16, shapes=[Shape(2, 4, 512, 64)], skip=["fla", "mlstm"])["rows"]
    timed = {row["impl"]: row for row in rows if row["fwd_bwd_ms"]}
    assert {"ours", "ours-sums", "ours-decay", "ours-window", "chunked", "sdpa-flash"} <= set(timed)
    assert all(0 < row["fwd_copy_share"] < 1.5 for row in timed.values())
    steps = run_suite("decode", gpu, torch.bfloat16, backends=["ours"])["decode"]
    assert all(row["graph_us"] > 0 for row in steps)
    errors = run_suite("errors", gpu, torch.bfloat16, backends=["ours"])["errors"]
    assert all(row["o"] < 1e-2 for row in errors)


def test_a_slow_call_takes_long():
    x = torch.rand(256, 256)
    fast, slow = time_call(lambda: x.sum(), CPU, 5), time_call(lambda: [x @ x for _ in range(50)], CPU, 5)
    assert 0 < fast.median < slow.median


def test_readme_shows_the_kernels_of_a_results_file(tmp_path, monkeypatch, rows):
    folder = tmp_path / "evals" / "results"
    monkeypatch.setattr("readme_results.ROOT", tmp_path)
    assert kernel_results_block(folder) is None
    gpu = [row | {"impl": impl, "N": 8192} for row in rows[:1] for impl in ("ours", "fla", "sdpa-cudnn")]
    write_bench(folder / "kernels" / "gpu.json", facts(peers={"fla-core": "0.6.0"}), {"rows": gpu})
    # Measured again where the peer is not installed.
    write_bench(folder / "kernels" / "gpu.json", facts(date="2026-01-03"), {"rows": gpu[:1]})
    block = kernel_results_block(folder)
    assert "fla-core 0.6.0" in block
    shown = f"{gpu[0]['fwd_ms']:.3f} ({gpu[0]['fwd_ms'] / gpu[0]['floor_fwd_ms']:.1f}x)"
    assert f"| 1, 2, 8192, 16 | `ours` | {shown} |" in block
    assert "(evals/results/kernels/gpu.json)" in block
