"""A first model in two and a half minutes of training on two CPU cores: Sherlock Holmes and War and Peace.

    python -m jaxlm.main --config configs/quickstart.py

The model has 1.9 million parameters and trains on 1.5 million tokens of its own vocabulary. It ends with about 1.64
bits per byte on the last 5% of the text, and writes sentences that sound like Tolstoy's at first.
`experiments.quickstart_peer` measures it beside nanoGPT's character model. A slower machine takes longer and reaches
the same score.
"""

import ml_collections

from jaxlm.config import default_config


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.batch_size = 12
    config.grad_accum_steps = 1
    config.mesh.data = 1  # too small for several devices
    config.microbatch_chunks = 1
    config.max_steps = 480
    config.eval_interval = 40
    config.save_interval = 96
    config.generation_interval = 120
    config.max_checkpoints = 5

    config.model.vocab_size = 8192
    config.model.context = 256
    config.model.layers = 3
    config.model.heads = 3
    config.model.width = 96
    config.model.mlp_width = 288
    config.model.qk_norm = True
    config.model.tied = False
    config.model.output_init = "zero"
    config.model.remat = False

    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 1.2e-2
    config.optimizer.muon_learning_rate = 8e-3
    config.optimizer.warmup_steps = 10
    config.optimizer.lr_schedule = "linear"
    config.optimizer.lr_decay_fraction = 0.5
    config.optimizer.min_lr_ratio = 0.0
    config.optimizer.weight_decay = 0.0
    config.optimizer.b1 = 0.85
    config.optimizer.b2 = 0.99
    config.optimizer.muon_momentum = 0.9
    config.optimizer.muon_b2 = 0.95
    config.optimizer.muon_weight_decay = 0.0
    config.optimizer.average = 0.98

    config.data.corpus = "novels"
    config.data.tokenizer = "own"
    config.data.val_fraction = 0.05
    config.data.eval_sequences = 32

    config.sample.texts = 4
    config.sample.tokens = 48
    config.sample.temperature = 0.6
    config.sample.prompts = (
        "The prince",
        "Pierre looked at",
        "Natasha was",
        "The old countess",
        "In the evening",
        "Sherlock Holmes",
        "The door opened and",
        "My dear Watson",
        "The French army",
        "Napoleon rode",
        "It was a cold morning",
        '"What is it?" said',
        "The young officer",
        "At that moment",
        "Prince Andrew",
        "She smiled",
        "I had seen",
        "There was no doubt",
        "The Emperor",
        "All the guests",
    )
    return config
