"""The sizes of `m2_60m.py` and a recipe that takes less than a fifth of its tokens to the same loss.

    python -m jaxlm.main --config configs/m2_60m_fast.py

The model has 59,295,744 parameters, with norms of queries and keys as Qwen3. Muon updates the matrices of the blocks,
Adam the rest. 30,000 steps of 16,384 tokens are 0.49 billion tokens, a little less than one epoch of TinyStories. As an
estimate, they take two days at the 2,500 to 3,000 tokens per second that `m2_60m.py` expects of an M2.

On novels, 873 steps end with a lower loss than 1,200 steps of `m2_60m.py`, which have 5.5 times as many tokens
(docs/learning.md). Nobody has trained this preset to its end or run it on a Mac yet. jax-metal needs
`--config.optimizer.average=0`.
"""

import ml_collections

from jaxlm.config import default_config


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.batch_size = 16
    config.grad_accum_steps = 1
    config.max_steps = 30_000
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
    config.model.qk_norm = True

    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 1.2e-2
    config.optimizer.b2 = 0.98
    config.optimizer.weight_decay = 0.0
    config.optimizer.muon_learning_rate = 2.2e-3
    config.optimizer.muon_momentum = 0.95
    config.optimizer.muon_momentum_warmup = 200
    config.optimizer.muon_b2 = 0.95
    config.optimizer.muon_weight_decay = 0.8
    config.optimizer.cautious = True
    config.optimizer.average = 0.98
    config.optimizer.warmup_steps = 80
    config.optimizer.lr_schedule = "linear"
    config.optimizer.lr_decay_fraction = 0.4
    config.optimizer.min_lr_ratio = 0.0

    config.data.corpus = "tinystories"
    config.sample.texts = 10
    return config
