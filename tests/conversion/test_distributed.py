"""Two gloo processes train as one process with twice the batch."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from hf_linattn.conversion.pipeline import convert

SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from hf_linattn.conversion.config import load_recipe
from hf_linattn.conversion.pipeline import convert
model, output, data, recipe = sys.argv[1:]
convert(model, output, load_recipe(recipe), data=data)
"""


def losses(folder):
    records = [json.loads(line) for line in (folder / "training_metrics.jsonl").read_text().splitlines()]
    return [r["loss"] for r in records if "loss" in r]


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(model_folder, text_file, tmp_path, tiny_recipe):
    options = ("transfer.tokens=1536", "distillation.tokens=1536", "distillation.gradient_checkpointing=true")
    halved = tiny_recipe(*options, "transfer.batch_size=2", "distillation.batch_size=2")
    whole = tiny_recipe(*options, "transfer.batch_size=4", "distillation.batch_size=4")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(halved.model_dump(mode="json")))
    (tmp_path / "script.py").write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = [model_folder, tmp_path / "two", text_file, tmp_path / "recipe.yaml"]
    finished = subprocess.run(
        [*launcher, str(tmp_path / "script.py"), *map(str, arguments)],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    convert(str(model_folder), tmp_path / "one", whole, data=str(text_file), device="cpu")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=2e-4)
    assert len(losses(tmp_path / "one")) == 12
    ids = torch.arange(1, 41).unsqueeze(0)
    with torch.no_grad():
        one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / n)(input_ids=ids).logits for n in ("one", "two"))
    torch.testing.assert_close(one, two, rtol=1e-2, atol=1e-2)
