"""What a run was to be, beside what it is."""

import numpy as np

from jaxlm.config import OptimizerConfig
from jaxlm.pages.metrics import Floats


def planned_lr(config: OptimizerConfig, max_steps: int, steps: Floats) -> Floats:
    """The learning rate that `core.optimizer.make_schedule` gives these steps of metrics.jsonl, without jax."""
    done, start, peak = steps - 1, config.lr_restart_step, config.lr_restart_ratio  # done: before the step
    if not start:
        return config.learning_rate * _rise_and_fall(config, max_steps, config.min_lr_ratio, done)
    first = _rise_and_fall(config, start, config.min_lr_ratio, done)
    second = peak * _rise_and_fall(config, max_steps - start, config.min_lr_ratio / peak, done - start)
    return config.learning_rate * np.where(done < start, first, second)


def _rise_and_fall(config: OptimizerConfig, steps: int, end: float, done: Floats) -> Floats:
    """A schedule of so many steps, which rises to 1 and falls to `end`."""
    decay_steps = max(1, round((steps - config.warmup_steps) * config.lr_decay_fraction))
    first = 1 / (config.warmup_steps + 1)
    warmup = first + (1 - first) * done / max(config.warmup_steps, 1)
    passed = np.clip((done - steps + decay_steps) / decay_steps, 0, 1)
    falling = (1 + np.cos(np.pi * passed)) / 2 if config.lr_schedule == "cosine" else 1 - passed
    return np.where(done < config.warmup_steps, warmup, end + (1 - end) * falling)
