"""lm-eval's own command line, in a process that cannot import this package, gives the figures that ours gives."""

import json
import os
import subprocess
import sys

import pytest

from hf_linattn.evals.lm_eval_tasks import run_tasks
from hf_linattn.evals.task_data import write_local_tasks

TASKS = ["piqa", "lambada_openai"]
WITHOUT_PACKAGE = """
import sys
sys.modules["hf_linattn"] = None
from lm_eval.__main__ import cli_evaluate
cli_evaluate()
"""


@pytest.mark.slow
def test_same_figures_from_remote_code(converted, task_data, tmp_path):
    out, folder, scores = tmp_path / "out", tmp_path / "yaml", tmp_path / "scores"
    folder.mkdir()
    converted.model.save_pretrained(out)
    converted.tokenizer.save_pretrained(out)
    write_local_tasks(task_data, TASKS, folder)
    command = ["--model", "hf", "--model_args", f"pretrained={out},trust_remote_code=True", "--tasks", ",".join(TASKS)]
    command += ["--include_path", str(folder), "--device", "cpu", "--batch_size", "2", "--output_path", str(scores)]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGE, *command],
        env=os.environ | offline,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    results = json.loads(next(scores.rglob("results_*.json")).read_text())["results"]
    ours = run_tasks(converted.model, converted.tokenizer, TASKS, task_data=task_data).metrics
    for task, metric in (("piqa", "acc"), ("piqa", "acc_norm"), ("lambada_openai", "perplexity")):
        assert results[task][f"{metric},none"] == pytest.approx(ours[task][metric], rel=1e-5), (task, metric)
