"""The 60M model on TinyStories, for an Apple M2 with 16 GB; a GPU or a CPU runs it as well.

    python -m jaxlm.main --config configs/m2_60m.py

59,294,720 parameters; 50,000 steps of 65,536 tokens, 3.28 billion tokens. A token costs about 0.38 GFLOP forward and
backward (0.44 if blocks are recomputed). An estimate: at 2,500 to 3,000 tokens a second a step takes 22 to 26 s and the
run 13 to 15 days; at 5,000 it takes 8 days. It has not been run on a Mac.

Memory by XLA's own analysis (`python -m experiments.memory`): 2.98 GB on an Apple GPU, which reuses no buffer and
recomputes no block; 1.37 GB on a CPU, of which 0.95 are the weights, the moments and the accumulated gradients, and
0.24 the gradients of a micro-batch. While a checkpoint is written, its copy takes another 0.71. Disk: up to 4.3 GB for
the five checkpoints and the next one, 0.24 for the model, 1.2 for the tokens.
"""

import ml_collections

from jaxlm.config import default_config


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.batch_size = 32
    config.grad_accum_steps = 2
    config.max_steps = 50_000
    config.eval_interval = 100
    config.save_interval = 300
    config.generation_interval = 50
    config.max_checkpoints = 5

    config.model.vocab_size = 50_257
    config.model.context = 1024
    config.model.layers = 8
    config.model.heads = 8
    config.model.width = 512
    config.model.mlp_width = 2048

    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 3e-4
    config.optimizer.warmup_steps = 100
    config.optimizer.lr_schedule = "cosine"
    config.optimizer.clip_norm = 1.0

    config.data.corpus = "tinystories"
    config.sample.texts = 10
    return config
