"""What a finished run leaves: the summary, and the files that make its folder complete."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from accelerate import Accelerator
from pydantic import BaseModel
from torch import nn
from transformers import PreTrainedModel

from hf_linattn import __version__, attention_modules
from hf_linattn.conversion.execution import device_name, peak_gib
from hf_linattn.conversion.model_card import write_model_card
from hf_linattn.conversion.run_state import RunState

VALIDATION = "validation"
SUMMARY_FILE, METRICS_FILE, RECIPE_FILE = "conversion.json", "training_metrics.jsonl", "recipe.yaml"


def summarize(
    name: str, run: RunState, identity: dict[str, Any], model: nn.Module, accelerator: Accelerator, config
) -> dict[str, Any]:
    """What the card and the results file say of a run: read from its metrics, which outlive interruptions."""
    stages: dict[str, dict[str, Any]] = {}
    validation: dict[str, Any] = {}
    for record in run.records():
        if record["stage"] == VALIDATION:
            validation[record["after"]] = {k: v for k, v in record.items() if k not in ("stage", "after")}
            continue
        stage = stages.setdefault(record["stage"], {"first_loss": record["loss"]})
        stage |= {"last_loss": record["loss"], "steps": record["step"]}
        stage |= {"tokens": record["tokens"], "seconds": record["seconds"]}
        stages[record["stage"]] = stage
    return {
        "name": name,
        "command": identity["command"],
        "run": digest(identity),
        "model": display_name(identity["model"], identity["gguf_file"]),
        "recipe": getattr(config, "name", None),
        "config": config.model_dump(mode="json"),
        "tokens": sum(stage["tokens"] for stage in stages.values()),
        "seconds": round(sum(stage["seconds"] for stage in stages.values()), 1),
        "peak_gib": round(peak_gib(accelerator.device), 2),
        "seed": config.seed,
        "device": device_name(accelerator.device),
        "stages": stages,
        "validation": validation,
        "num_layers": len(attention_modules(model)),
        "linear_attention": dict(model.config.linear_attention_config),
        "versions": {"hf_linattn": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }


def fill_folder(
    folder: Path, model: PreTrainedModel, tokenizer, settings: BaseModel, run: RunState, summary: dict[str, Any]
) -> None:
    """Everything that makes a folder complete: weights, code, tokenizer, settings, metrics, summary, card."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    text = yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    (folder / RECIPE_FILE).write_text(text, encoding="utf-8")
    shutil.copyfile(run.metrics_path, folder / METRICS_FILE)
    (folder / SUMMARY_FILE).write_text(json.dumps(summary, indent=2), encoding="utf-8")
    write_model_card(folder, summary)


def finished(output: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The summary in `output` if it is the result of the run `identity`, else None."""
    path = output / SUMMARY_FILE
    if not path.is_file():
        return None
    summary = json.loads(path.read_text(encoding="utf-8"))
    return summary if summary.get("run") == digest(identity) else None


def digest(identity: dict[str, Any]) -> str:
    """A short name of everything that decides a run's result."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def display_name(model: str, gguf_file: str | None) -> str:
    """What cards call `model`: its Hub id, or the last part of a local path, which says nothing elsewhere."""
    if not Path(model).exists():
        return model
    return Path(gguf_file or model).name


def source_name(model: str) -> str:
    """A model's name, the same from whatever folder a local one is named."""
    return str(Path(model).resolve()) if Path(model).exists() else model
