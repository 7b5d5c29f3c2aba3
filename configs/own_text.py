"""A model of your own text: the sizes are chosen for it and for the hours that you give, on the machine that you have.

    python -m jaxlm.main --config own_text --config.hours=8 --config.data.corpus=letters.txt

The text is a few hundred kilobytes or more. The first session measures the speed and chooses the vocabulary, the model,
the batch and the steps (jaxlm/planner/sizes.py has the rule); config.json in the work directory keeps them. The
checkpoint with the lowest validation loss is kept, and the final model is made of it. Samples continue beginnings of
the text's own paragraphs. jax-metal needs `--config.optimizer.average=0`.
"""

import ml_collections

from jaxlm.config import default_config


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.hours = 8.0
    config.mesh.data = 1  # too small for several devices
    config.keep_best = True
    config.grad_accum_steps = 1
    config.max_checkpoints = 2

    config.model.output_init = "zero"
    config.model.remat = False
    config.model.qk_norm = True

    config.optimizer.name = "muon"
    config.optimizer.warmup_steps = 10
    config.optimizer.lr_schedule = "linear"
    config.optimizer.lr_decay_fraction = 0.55
    config.optimizer.min_lr_ratio = 0.0
    config.optimizer.b2 = 0.99
    config.optimizer.weight_decay = 0.0
    config.optimizer.muon_b2 = 0.95
    config.optimizer.cautious = True
    config.optimizer.average = 0.98

    config.data.corpus = ""
    config.data.tokenizer = "own"
    config.data.eval_sequences = 0

    config.sample.prompts = ()
    config.sample.texts = 4
    config.sample.tokens = 100
    config.sample.temperature = 0.7
    return config
