"""A run killed at any step goes on with the losses of the unbroken one; another run is refused."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file

from hf_linattn.conversion.pipeline import convert
from hf_linattn.conversion.run_state import RunState
from hf_linattn.errors import UserError

STEPS = 40
BUDGET = (f"transfer.tokens={STEPS * 128}", f"distillation.tokens={STEPS * 128}")
ROWS = (
    "transfer.batch_size=2",
    "distillation.batch_size=2",
    "distillation.attention_dropout=0.1",
    "checkpoint_every=7",
)
TIMING = ("tokens_per_second", "seconds")

SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from hf_linattn.conversion.config import load_recipe
from hf_linattn.conversion.pipeline import convert
model, output, data, recipe = sys.argv[1:]
convert(model, output, load_recipe(recipe), data=data, device="cpu")
"""


def metrics(path):
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in TIMING} for record in records]


@pytest.fixture(scope="module")
def unbroken(model_folder, text_file, tiny_recipe, tmp_path_factory):
    config = tiny_recipe(*BUDGET, *ROWS)
    output = tmp_path_factory.mktemp("unbroken") / "out"
    convert(str(model_folder), output, config, data=str(text_file), device="cpu")
    return config, output


def kill_at(count, stage, run_folder, process):
    """SIGKILL once `stage` has logged `count` steps."""
    path, deadline = run_folder / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        text = path.read_text() if path.exists() else ""
        if text.count(f'"stage": "{stage}"') >= count:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return
        time.sleep(0.002)
    pytest.fail(f"{stage} never logged {count} steps: {process.communicate()[1]}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "step"),
    [("attention_transfer", None), ("logit_distillation", 3), ("logit_distillation", None)],
    ids=["transfer", "between-stages", "distillation"],
)
def test_resume_after_sigkill_repeats_the_losses_exactly(unbroken, model_folder, text_file, tmp_path, stage, step):
    config, expected = unbroken
    recipe, output = tmp_path / "standard.yaml", tmp_path / "out"
    recipe.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(model_folder), str(output), str(text_file), str(recipe)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    # Step 3 of the second stage comes before its first checkpoint; no step given: any.
    kill_at(step or random.SystemRandom().randint(1, STEPS - 10), stage, tmp_path / "out.run", process)
    assert not output.exists()
    convert(str(model_folder), output, config, data=str(text_file), device="cpu", resume=True)
    assert metrics(output / "training_metrics.jsonl") == metrics(expected / "training_metrics.jsonl")
    ours, theirs = load_file(output / "model.safetensors"), load_file(expected / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture
def killed(model_folder, text_file, tmp_path, tiny_recipe, monkeypatch):
    """An unfinished run: it fails at its 5th step of distillation."""
    from hf_linattn.conversion import training_loop

    def fail_at_5(loss, norm, where):
        if where.endswith("step 5"):
            raise KeyboardInterrupt

    monkeypatch.setattr(training_loop, "_check_finite", fail_at_5)
    with pytest.raises(KeyboardInterrupt):
        convert(str(model_folder), tmp_path / "out", tiny_recipe(), data=str(text_file), device="cpu")
    monkeypatch.undo()
    return tmp_path / "out"


def test_an_unfinished_run_is_not_overwritten_by_chance(killed, model_folder, text_file, tiny_recipe):
    with pytest.raises(
        UserError, match=r"holds an unfinished run \(step 3 of logit_distillation\); --resume continues"
    ):
        convert(str(model_folder), killed, tiny_recipe(), data=str(text_file), device="cpu")
    convert(str(model_folder), killed, tiny_recipe(), data=str(text_file), device="cpu", overwrite=True)
    assert (killed / "model.safetensors").exists()


def test_a_run_of_another_config_is_refused_with_the_keys_that_differ(killed, model_folder, text_file, tiny_recipe):
    other = tiny_recipe("transfer.learning_rate=0.5", "seed=3")
    message = r"config.seed is 0 there and 3 now, config.transfer.learning_rate is 0.01 there and 0.5 now"
    with pytest.raises(UserError, match=message):
        convert(str(model_folder), killed, other, data=str(text_file), device="cpu", resume=True)
    # What does not change the result may change.
    convert(
        str(model_folder), killed, tiny_recipe("checkpoint_every=50"), data=str(text_file), device="cpu", resume=True
    )


def test_two_checkpoints_are_kept_and_an_incomplete_one_is_ignored(killed):
    checkpoints = killed.with_name("out.run") / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "attention_transfer-00000008",
        "logit_distillation-00000003",
    ]


def test_a_checkpoint_being_written_when_killed_does_not_count(run, accelerator):
    module = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    run.log({"step": 1})
    run.save("stage", 1, 0.5, module, optimizer)
    torn = run.folder / "checkpoints" / "stage-00000002.tmp"
    torn.mkdir()
    (torn / "tensors.safetensors").write_bytes(b"half")
    run.log({"step": 2})
    again = RunState(run.folder, {"what": "test"}, accelerator, resume=True)
    assert again.checkpoint.step == 1
    assert again.records() == [{"step": 1}]
    fresh = torch.nn.Linear(2, 2)
    restored = torch.optim.AdamW(fresh.parameters())
    again.load(fresh, restored)
    assert torch.equal(fresh.weight, module.weight)
    for ours, theirs in zip(fresh.parameters(), module.parameters(), strict=True):
        for key, value in optimizer.state[theirs].items():
            assert torch.equal(restored.state[ours][key], value), key
    with pytest.raises(UserError, match="its parameters are not those of this model"):
        again.load(torch.nn.Linear(2, 2, bias=False))
