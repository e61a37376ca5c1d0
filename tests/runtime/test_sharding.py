"""FSDP2 on two CPU processes: the float32 parameters of a bf16 model are a group of their own; nothing changes."""

import os
import subprocess
import sys

import torch
from tiny_models import tiny_model

from hf_linattn import LinearAttentionConfig, linearize

SCRIPT = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
import hf_linattn

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
ids = torch.arange(3, 43).view(2, 20)
plain = model(ids, labels=ids, use_cache=False)
plain.loss.backward()
expected = {n: p.grad.clone() for n, p in model.named_parameters() if ".linear_attention." in n}
model.zero_grad()

groups = [m for m in model.modules() if type(m).__name__ in model._no_split_modules]
for module in [*reversed(groups), model]:
    fully_shard(module, mesh=mesh)
assert all(isinstance(p, DTensor) for p in model.parameters())
result = model(ids, labels=ids, use_cache=False)
result.loss.backward()
assert torch.equal(result.logits, plain.logits), (result.logits - plain.logits).abs().max()
found = {n: p.grad.full_tensor() for n, p in model.named_parameters() if ".linear_attention." in n}
assert found.keys() == expected.keys() and len(found) == 12, found.keys()
for name, gradient in expected.items():
    assert torch.allclose(found[name], gradient, rtol=1e-3, atol=1e-6), name
print("rank", dist.get_rank(), "agrees", flush=True)
dist.destroy_process_group()
"""


def test_fully_sharded_model_computes_the_same(tmp_path):
    model = linearize(tiny_model("llama", dtype=torch.bfloat16), LinearAttentionConfig(window=4))
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "script.py").write_text(SCRIPT)
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        + [str(tmp_path / "script.py"), str(tmp_path / "model")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("agrees") == 2
