"""The recipe of `m2_60m_fast.py` with a vocabulary of 8,192 tokens, learnt from the text, instead of GPT-2's.

    python -m jaxlm.main --config configs/m2_8k_fast.py

The model has 37,758,464 parameters. A token takes 0.25 GFLOP forward and backward, where GPT-2's vocabulary takes 0.38,
and holds about 6% less text. The vocabulary is learnt while the text is prepared, and is part of every checkpoint and
export. Losses compare with those of `m2_60m_fast.py` in bits per byte. 30,000 steps of 16,384 tokens are 0.49 billion
tokens.

On novels, its mean loss after a quarter of the arithmetic is below that of 1,200 steps of a tuned AdamW in GPT-2's
vocabulary (docs/learning.md). Nobody has trained this preset to its end or run it on a Mac yet. jax-metal needs
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

    config.model.vocab_size = 8192
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
    config.data.tokenizer = "own"
    config.sample.texts = 10
    return config
