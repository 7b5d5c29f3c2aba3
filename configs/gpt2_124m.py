"""GPT-2 small's sizes in jaxlm's architecture, for one to eight GPUs of a server.

    python -m jaxlm.main --config configs/gpt2_124m.py

The model has 123,552,768 parameters, with norms of queries and keys as Qwen3: RMSNorm, RoPE and SwiGLU instead of
GPT-2's layers, and GPT-2's vocabulary. 38,000 steps of 65,536 tokens are 2.49 billion tokens, 20 a parameter.
TinyStories has about 0.5 billion. For a wider text, name its files with --config.data.corpus, or its tokens with
--config.data.dir.

Nobody has trained this preset. The recipe is that of `m2_60m_fast.py`. Both of its learning rates are multiplied by
1.63, the root of 4 times the batch and of 1 / 1.5 of the width. docs/learning.md has one measurement of either rule, on
few tokens. `model.remat` acts on a CPU, and on a GPU with `microbatch_chunks`.

Memory of a device: weights, optimizer state and gradients take 1.88 GB, with mesh.fsdp 8 an eighth, 0.24 GB. During a
save come 1.39 GB, or 0.17 GB. Activations are beside that (docs/planning.md): `python -m jaxlm.plan` shows them.
"""

import ml_collections

from jaxlm.config import default_config


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.batch_size = 64
    config.grad_accum_steps = 1
    config.max_steps = 38_000
    config.eval_interval = 100
    config.save_interval = 500
    config.generation_interval = 500
    config.max_checkpoints = 5

    config.model.vocab_size = 50_257
    config.model.context = 1024
    config.model.layers = 12
    config.model.heads = 12
    config.model.width = 768
    config.model.mlp_width = 2048
    config.model.remat = True
    config.model.qk_norm = True

    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 2e-2
    config.optimizer.b2 = 0.98
    config.optimizer.weight_decay = 0.0
    config.optimizer.muon_learning_rate = 3.6e-3
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
