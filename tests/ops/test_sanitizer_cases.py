"""The script that runs under compute-sanitizer works; what the sanitizer finds is for `make sanitize`."""

import runpy
import sys
from pathlib import Path


def test_every_case_runs(monkeypatch, capsys):
    script = str(Path(__file__).with_name("sanitizer_cases.py"))
    monkeypatch.setenv("HF_LINATTN_CUDA_PATH", "auto")
    monkeypatch.setattr(sys, "argv", [script, "--backend", "chunked", "--device", "cpu", "--paths", "auto"])
    runpy.run_path(script, run_name="__main__")
    assert "finite" in capsys.readouterr().out.splitlines()[-1]
