"""GPT-2 medium's sizes in jaxlm's architecture, for two to eight GPUs of a server.

    python -m jaxlm.main --config configs/gpt2_350m.py

The model has 350,360,576 parameters, with norms of queries and keys as Qwen3: RMSNorm, RoPE and SwiGLU instead of
GPT-2's layers, and GPT-2's vocabulary. 107,000 steps of 65,536 tokens are 7.0 billion tokens, 20 a parameter.
TinyStories has about 0.5 billion. For a wider text, name its files with --config.data.corpus, or its tokens with
--config.data.dir.

Nobody has trained this preset. The recipe is that of `m2_60m_fast.py`. Both of its learning rates are multiplied by
1.41, the root of 4 times the batch and of 1 / 2 of the width. docs/learning.md has one measurement of either rule, on
few tokens and at most 12 layers. `model.remat` acts on a CPU, and on a GPU with `microbatch_chunks`.

Memory of a device: weights, optimizer state and gradients take 5.11 GB, with mesh.fsdp 8 an eighth, 0.64 GB. During a
save come 3.71 GB, or 0.46 GB. Activations are beside that (docs/planning.md): `python -m jaxlm.plan` shows them.
"""

import ml_collections

from jaxlm.config import default_config


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.batch_size = 64
    config.grad_accum_steps = 1
    config.max_steps = 107_000
    config.eval_interval = 100
    config.save_interval = 500
    config.generation_interval = 500
    config.max_checkpoints = 5

    config.model.vocab_size = 50_257
    config.model.context = 1024
    config.model.layers = 24
    config.model.heads = 16
    config.model.width = 1024
    config.model.mlp_width = 2688
    config.model.remat = True
    config.model.qk_norm = True

    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 1.7e-2
    config.optimizer.b2 = 0.98
    config.optimizer.weight_decay = 0.0
    config.optimizer.muon_learning_rate = 3.1e-3
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
