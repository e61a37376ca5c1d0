"""README.md of a converted folder: front matter for the Hub, how to load it, what made it, what was measured.

It states only what a run recorded: numbers come from the summary and, once evaluated, from the results.
"""

from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCardData

TEMPLATE = "model_card.md.j2"
LIBRARY_TAGS = ["hf_linattn", "linear-attention"]


def write_model_card(
    folder: str | Path,
    summary: dict[str, Any],
    results: dict[str, Any] | None = None,
    results_table: str | None = None,
    plots: tuple[str, ...] = (),
) -> Path:
    """Write `folder/README.md`.

    Args:
        folder (`str` or `Path`): of the converted model.
        summary (`dict`): as `convert` or `finetune` returns it.
        results (`dict`, *optional*): an evaluation, `{"teacher": {task: {metric: value}}, "student": {...}, ...}`.
        results_table (`str`, *optional*): the same in Markdown.
        plots (`tuple[str, ...]`): names of image files in the folder.

    Returns:
        Path of the card.
    """
    folder = Path(folder)
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(
        resources.files("hf_linattn.conversion").joinpath(TEMPLATE).read_text(encoding="utf-8")
    )
    hub_id = summary["model"] if _is_hub_id(summary["model"]) else None
    text = template.render(
        front_matter=_front_matter(summary, results, hub_id),
        summary=summary,
        hub_id=hub_id,
        attention=summary["linear_attention"],
        softmax_layers=summary["linear_attention"]["softmax_layers"],
        layer_windows=_layer_windows(summary["linear_attention"].get("layer_windows", {})),
        kl_measured={stage: values for stage, values in summary["validation"].items() if "kl" in values},
        results_table=results_table,
        plots=plots,
    )
    path = folder / "README.md"
    path.write_text(text, encoding="utf-8")
    return path


def _front_matter(summary: dict[str, Any], results: dict[str, Any] | None, hub_id: str | None) -> str:
    data = ModelCardData(
        base_model=hub_id,
        library_name="transformers",
        tags=LIBRARY_TAGS,
        pipeline_tag="text-generation",
        model_name=summary["name"],
        eval_results=_eval_results(results) or None,
    )
    return data.to_yaml()


def _layer_windows(windows: dict[int | str, int]) -> str:
    """`" (1024 in layers 7, 8)"`; nothing where all layers have the same window. JSON makes the keys strings."""
    layers: dict[int, list[str]] = {}
    for layer, window in sorted(windows.items(), key=lambda item: int(item[0])):
        layers.setdefault(window, []).append(str(layer))
    parts = [
        f"{window} in layer{'s' if len(found) > 1 else ''} {', '.join(found)}" for window, found in layers.items()
    ]
    return f" ({'; '.join(parts)})" if parts else ""


def _eval_results(results: dict[str, Any] | None) -> list[EvalResult]:
    """The student's task scores in the Hub's form."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=task,
            dataset_name=task,
            metric_type=metric,
            metric_value=value,
        )
        for task, metrics in (results or {}).get("student", {}).items()
        for metric, value in metrics.items()
        if isinstance(value, int | float)
    ]


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))
