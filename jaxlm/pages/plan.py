"""What a run was to be, beside what it is."""

import numpy as np

from jaxlm.config import OptimizerConfig
from jaxlm.pages.metrics import Floats


def planned_lr(config: OptimizerConfig, max_steps: int, steps: Floats) -> Floats:
    """The learning rate that `core.optimizer.make_schedule` gives these steps of metrics.jsonl, without jax."""
    done = steps - 1  # before the step
    decay_steps = max(1, round((max_steps - config.warmup_steps) * config.lr_decay_fraction))
    first = 1 / (config.warmup_steps + 1)
    warmup = first + (1 - first) * done / max(config.warmup_steps, 1)
    passed = np.clip((done - max_steps + decay_steps) / decay_steps, 0, 1)
    falling = (1 + np.cos(np.pi * passed)) / 2 if config.lr_schedule == "cosine" else 1 - passed
    decay = config.min_lr_ratio + (1 - config.min_lr_ratio) * falling
    return config.learning_rate * np.where(done < config.warmup_steps, warmup, decay)
