"""Learning rate, dropout and random seed as pure functions of the step, so that a resumed run needs none of them."""

import math

import numpy as np
import torch


def learning_rate_factor(step: int, num_steps: int, warmup: float, schedule: str) -> float:
    """Factor on the peak learning rate for `step` (from 0): linear warm-up over a fraction, then `schedule` to 0."""
    warmup_steps = round(num_steps * warmup)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return decline(step - warmup_steps, num_steps - warmup_steps, schedule)


def decline(step: int, num_steps: int, schedule: str) -> float:
    """From 1 at step 0 towards 0 at `num_steps`: `linear`, `cosine`, or `constant`, which stays 1."""
    progress = step / max(num_steps, 1)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - progress if schedule == "linear" else 1.0


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's `lr` to its `peak_lr` times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def stage_seed(seed: int, stage: str) -> int:
    """Seed of a stage's row order, so that stages do not see the same rows in the same order."""
    return int(np.random.SeedSequence([seed, *stage.encode()]).generate_state(1)[0])


def seed_step(seed: int, step: int, process: int) -> None:
    """Seed torch's generators (dropout, noise) for one step of one process."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, process]).generate_state(1, np.uint64)[0]) >> 1)
