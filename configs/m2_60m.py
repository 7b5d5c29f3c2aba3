"""The 60M model on TinyStories, for an Apple M2 with 16 GB; a GPU or a CPU runs it as well.

    python -m jaxlm.main --config configs/m2_60m.py

The model has 59,294,720 parameters. It trains for 50,000 steps of 65,536 tokens, 3.28 billion tokens in all. A token
costs about 0.38 GFLOP forward and backward, or 0.44 with remat. As an estimate, 2,500 to 3,000 tokens per second make
22 to 26 s per step and 13 to 15 days in all; 5,000 make 8 days. Nobody has run it on a Mac yet.

On novels, `m2_60m_fast.py` reaches the loss of 1,200 steps of this recipe with 5.5 times fewer tokens
(docs/learning.md). If that held for all 50,000 steps, it would take two and a half days for these 13 to 15, and
`m2_8k_fast.py`, with 0.66 of the arithmetic a token, less than two.

Memory, as XLA analyses the compiled step (`python -m experiments.memory`): 2.91 GB on an Apple GPU, which reuses no
buffer and needs no remat; 1.36 GB on a CPU, with remat. Of these, 0.95 GB are the weights, the moments and the
accumulated gradients, and 0.24 GB the gradients of a micro-batch. During a save, a copy of the weights and moments
takes 0.71 GB more. Disk: up to 5.0 GB for five checkpoints, a rolling one and the next, 0.24 GB for the model, 1.2 GB
for the tokens.
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
    config.model.remat = True

    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 3e-4
    config.optimizer.warmup_steps = 100
    config.optimizer.lr_schedule = "cosine"
    config.optimizer.clip_norm = 1.0

    config.data.corpus = "tinystories"
    config.sample.texts = 10
    return config
