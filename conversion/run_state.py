"""The run folder: what a conversion or fine-tuning leaves on disk so that a killed one continues where it was.

    run.json          what the run does; another one is refused
    metrics.jsonl     one record per step
    checkpoints/      <stage>-<step>/{tensors.safetensors, state.json}, the last two

A checkpoint holds the trained parameters and the optimizer's moments. Learning rate, dropout, batches and random state
are functions of (seed, step), so they need no storage. It also holds the length of metrics.jsonl: what a killed run
logged after its last checkpoint is cut off, and the resumed run logs those steps again.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from hf_linattn.errors import UserError

RUN_FILE = "run.json"
CHECKPOINTS_KEPT = 2


@dataclass(frozen=True)
class Checkpoint:
    """`step` steps of `stage` are done; `seconds` is the time the stage had taken."""

    path: Path
    stage: str
    step: int
    seconds: float
    metrics_bytes: int


class RunState:
    """A run folder. Every process opens it; only the main one writes.

    Args:
        folder (`Path`): created if absent.
        identity (`dict`): all that decides the result, JSON-ready.
        accelerator (`Accelerator`): of this run.
        resume (`bool`): continue what the folder holds.

    Raises:
        UserError: the folder holds an unfinished run and `resume` is not set, or another run (differing keys named).
    """

    def __init__(self, folder: Path, identity: dict[str, Any], accelerator: Accelerator, *, resume: bool):
        self.folder, self.accelerator = folder, accelerator
        self.metrics_path = folder / "metrics.jsonl"
        found = _read_json(folder / RUN_FILE)
        self.checkpoint = _latest_checkpoint(folder / "checkpoints")
        if self.checkpoint is not None and not resume:
            raise UserError(
                f"{folder} holds an unfinished run (step {self.checkpoint.step} of {self.checkpoint.stage}); --resume "
                "continues it, --overwrite starts afresh"
            )
        # As JSON on both sides: tuples become lists.
        identity = json.loads(json.dumps(identity))
        if resume and found is not None and found != identity:
            raise UserError(
                f"{folder} holds another run: {_differences(found, identity)}; use another output folder, or start "
                "afresh with --overwrite"
            )
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            _write_atomically(folder / RUN_FILE, json.dumps(identity, indent=2))
            self._cut_metrics()
        accelerator.wait_for_everyone()

    def log(self, record: dict[str, Any]) -> None:
        """Append one record to metrics.jsonl; on the main process, which alone calls this."""
        with self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def records(self) -> list[dict[str, Any]]:
        """Everything logged so far."""
        if not self.metrics_path.exists():
            return []
        return [json.loads(line) for line in self.metrics_path.read_text(encoding="utf-8").splitlines()]

    def first_step(self, stage: str, stages: tuple[str, ...]) -> int | None:
        """Step at which `stage` goes on: 0 if it has not begun, None if a later one of `stages` has a checkpoint."""
        if self.checkpoint is None or stages.index(self.checkpoint.stage) < stages.index(stage):
            return 0
        return self.checkpoint.step if self.checkpoint.stage == stage else None

    def save(self, stage: str, step: int, seconds: float, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Write a checkpoint; called by every process, since sharded parameters have to be gathered.

        The folder appears complete or not at all. An earlier checkpoint is removed only afterwards.
        """
        tensors = gather_trainable(module) | _gather_optimizer(module, optimizer)
        if self.accelerator.is_main_process:
            path = self.folder / "checkpoints" / f"{stage}-{step:08d}"
            temporary = path.with_name(f"{path.name}.tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            save_file(tensors, temporary / "tensors.safetensors")
            metrics_bytes = self.metrics_path.stat().st_size if self.metrics_path.exists() else 0
            state = {"stage": stage, "step": step, "seconds": seconds, "metrics_bytes": metrics_bytes}
            (temporary / "state.json").write_text(json.dumps(state), encoding="utf-8")
            sync_folder(temporary)
            shutil.rmtree(path, ignore_errors=True)
            os.replace(temporary, path)
            for old in _checkpoint_folders(self.folder / "checkpoints")[:-CHECKPOINTS_KEPT]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()
        self.checkpoint = _latest_checkpoint(self.folder / "checkpoints")

    def load(self, module: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Put the checkpoint's values into the trainable parameters of `module`, and into `optimizer` if given."""
        tensors = load_file(self.checkpoint.path / "tensors.safetensors")
        parameters = _trainable(module)
        stored = {key.removeprefix("parameter.") for key in tensors if key.startswith("parameter.")}
        if stored != set(parameters):
            raise UserError(
                f"{self.checkpoint.path}: its parameters are not those of this model "
                f"({len(stored ^ set(parameters))} names differ); remove {self.folder} and start again"
            )
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(_shard_like(tensors[f"parameter.{name}"], parameter))
        if optimizer is None:
            return
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise UserError(
                f"--resume: DeepSpeed keeps the optimizer's state to itself, so {self.checkpoint.path} lacks it; "
                "resume with the DDP or FSDP2 configuration, or start again with --overwrite"
            )
        for name, parameter in parameters.items():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                value = tensors.get(f"optimizer.{key}.{name}")
                if value is not None:
                    moment = value if value.ndim == 0 else _shard_like(value, parameter)
                    optimizer.state[parameter][key] = moment

    def __enter__(self) -> "RunState":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        """A run refused before it had anything to resume from leaves no folder behind."""
        if error is not None and not any(p.is_file() and p.name != RUN_FILE for p in self.folder.rglob("*")):
            self.remove()

    def remove(self) -> None:
        """Delete the folder: the run is finished and its result saved."""
        if self.accelerator.is_main_process:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _cut_metrics(self) -> None:
        length = 0 if self.checkpoint is None else self.checkpoint.metrics_bytes
        if self.metrics_path.exists():
            os.truncate(self.metrics_path, length)


def open_run(
    output: Path, identity: dict[str, Any], accelerator: Accelerator, *, resume: bool, overwrite: bool
) -> RunState:
    """The run folder `OUTPUT.run`; an unfinished run there is continued with `resume` and dropped with `overwrite`."""
    folder = output.with_name(f"{output.name}.run")
    if overwrite and not resume and accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
    accelerator.wait_for_everyone()
    return RunState(folder, identity, accelerator, resume=resume)


def gather_trainable(module: nn.Module) -> dict[str, Tensor]:
    """`parameter.<name>` -> CPU tensor of every trainable parameter, whole even where FSDP keeps shards."""
    return {f"parameter.{name}": _whole(parameter) for name, parameter in _trainable(module).items()}


def sync_folder(folder: Path) -> None:
    """Make the files of `folder` durable before a rename makes them visible."""
    for path in [*(p for p in folder.rglob("*") if p.is_file()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _gather_optimizer(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"optimizer.{key}.{name}": _whole(value)
        for name, parameter in _trainable(module).items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def _whole(tensor: Tensor) -> Tensor:
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.detach().cpu().contiguous().clone()


def _shard_like(value: Tensor, parameter: Tensor) -> Tensor:
    value = value.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value


def _checkpoint_folders(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [path for path in folder.glob("*-*") if not path.name.endswith(".tmp") and (path / "state.json").exists()]
    return sorted(found, key=lambda path: (path / "state.json").stat().st_mtime_ns)


def _latest_checkpoint(folder: Path) -> Checkpoint | None:
    folders = _checkpoint_folders(folder)
    return Checkpoint(path=folders[-1], **_read_json(folders[-1] / "state.json")) if folders else None


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _differences(found: dict, wanted: dict, prefix: str = "") -> str:
    """`key: value there, value now` for every leaf that differs."""
    parts = []
    for key in sorted(found.keys() | wanted.keys()):
        old, new = found.get(key), wanted.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            parts.append(_differences(old, new, f"{prefix}{key}."))
        elif old != new:
            parts.append(f"{prefix}{key} is {old!r} there and {new!r} now")
    return ", ".join(part for part in parts if part)
