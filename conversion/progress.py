"""One stage's progress: a bar with tokens/s and loss on a terminal, ten lines in a log file, JSON lines in the run."""

import logging
import time
from contextlib import AbstractContextManager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hf_linattn.conversion.run_state import RunState

logger = logging.getLogger(__name__)
LOG_LINES = 10


class StageProgress(AbstractContextManager):
    """Reports the steps of one stage; silent on processes other than the main one.

    Args:
        run (`RunState`): whose metrics.jsonl gets a record per step.
        stage (`str`): its name.
        num_steps (`int`): steps in all.
        first_step (`int`): steps already done by an interrupted run.
    """

    def __init__(self, run: RunState, stage: str, num_steps: int, first_step: int = 0):
        self.run, self.stage, self.num_steps = run, stage, num_steps
        self.is_main = run.accelerator.is_main_process
        resumed = run.checkpoint is not None and run.checkpoint.stage == stage and first_step > 0
        self._earlier_seconds = run.checkpoint.seconds if resumed else 0.0
        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self.is_main or not self._console.is_terminal,
        )
        self._task = self._bar.add_task(stage.replace("_", " "), total=num_steps, completed=first_step, text="")
        self._started = self._last = time.perf_counter()

    def __enter__(self) -> "StageProgress":
        self._started = self._last = time.perf_counter()
        self._bar.start()
        return self

    def __exit__(self, *exception) -> None:
        self._bar.stop()

    @property
    def seconds(self) -> float:
        """Time this stage has taken, earlier attempts up to their last checkpoint included."""
        return self._earlier_seconds + time.perf_counter() - self._started

    def step(self, step: int, step_tokens: int, record: dict[str, Any]) -> None:
        """Report that `step` steps are done; `record` holds at least `loss`."""
        now = time.perf_counter()
        tokens_per_second = step_tokens / max(now - self._last, 1e-9)
        self._last = now
        if not self.is_main:
            return
        timing = {"tokens_per_second": round(tokens_per_second, 1), "seconds": round(self.seconds, 3)}
        self.run.log({"stage": self.stage, "step": step} | record | timing)
        text = f"loss {record['loss']:.4f}  {tokens_per_second:,.0f} tokens/s"
        self._bar.update(self._task, completed=step, text=text)
        if not self._console.is_terminal and (step * LOG_LINES // self.num_steps) != (
            (step - 1) * LOG_LINES // self.num_steps
        ):
            logger.info("%s: step %d of %d, %s", self.stage, step, self.num_steps, text)
