"""The decoder as one would write it in PyTorch: the peer of `throughput.py` and `time_to_loss.py`, which run it.

    python -m experiments.torch_llama --device cuda --batch 32 --accum 2 --dtype bfloat16 --steps 20

torch.compile, scaled_dot_product_attention, fused AdamW, gradient clipping, autocast to bfloat16 where asked, and the
vocabulary padded to a multiple of 64. The command trains the 60M preset on random tokens and prints one JSON line. With
`--devices` it trains on so many GPUs of this machine by DistributedDataParallel, a process each; the batch and the rate
are those of one GPU.
"""

import argparse
import json
import math
import resource
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle
from statistics import median

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from configs import m2_60m
from experiments.cleanup import temporary_folder
from jaxlm.config import Config, ModelConfig, OptimizerConfig, from_config_dict
from jaxlm.data.token_files import IGNORED_TARGET

VOCAB_MULTIPLE = 64  # rows of the embedding, for fast matmuls


class Block(nn.Module):
    """RMSNorm, attention with RoPE; RMSNorm, SwiGLU."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.heads = c.heads
        self.attention_norm = nn.RMSNorm(c.width, eps=c.norm_eps)
        self.mlp_norm = nn.RMSNorm(c.width, eps=c.norm_eps)
        self.qkv = nn.Linear(c.width, 3 * c.width, bias=False)
        self.output = nn.Linear(c.width, c.width, bias=False)
        self.gate_up = nn.Linear(c.width, 2 * c.mlp_width, bias=False)
        self.down = nn.Linear(c.mlp_width, c.width, bias=False)

    def forward(self, x, cos, sin):
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.output(attended.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


def apply_rope(x, cos, sin):
    """RoPE, half-split, in float32."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class Decoder(nn.Module):
    """The model, of the sizes of `c`; its forward pass gives the loss. Its initial weights are drawn as jaxlm's."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.embedding = nn.Embedding(-(-c.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE, c.width)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = nn.RMSNorm(c.width, eps=c.norm_eps)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                to_residual_stream = name.endswith(("output.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * c.layers) if to_residual_stream else 0.02)
        head_width = c.width // c.heads
        frequencies = c.rope_theta ** (-torch.arange(0, head_width, 2) / head_width)
        angles = torch.arange(c.context)[:, None] * frequencies
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def logits(self, ids):
        """[B, T, vocabulary with padding], for ids [B, T] with T the context."""
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.norm(x) @ self.embedding.weight.T

    def forward(self, ids, targets, reduction="mean"):
        """The mean or the sum of -ln p(target), in nats."""
        logits = self.logits(ids).flatten(0, 1).float()
        return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED_TARGET, reduction=reduction)


def lr_scale(c: OptimizerConfig, max_steps: int, step: int) -> float:
    """The learning rate after `step` steps as a fraction of its peak: `jaxlm.core.optimizer.make_schedule`."""
    decay_steps = max(1, round((max_steps - c.warmup_steps) * c.lr_decay_fraction))
    progress = max(0, step - (max_steps - decay_steps)) / decay_steps
    fall = 1 - progress if c.lr_schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return min(1, (step + 1) / (c.warmup_steps + 1)) * (c.min_lr_ratio + (1 - c.min_lr_ratio) * fall)


class Peer:
    """A decoder that PyTorch trains with AdamW, as a config says. Forward and backward passes are compiled.

    The config's precision is float32, bf16 or auto: bf16 on a GPU, float32 on a CPU.
    """

    def __init__(self, config: Config, device: str, distributed: bool = False):
        """Draws the weights from the config's seed. `device` is cpu or cuda.

        If `distributed`, the processes of torch.distributed average the gradients of each optimizer step.
        """
        torch.manual_seed(config.seed)
        torch.set_float32_matmul_precision("high" if device == "cuda" else "highest")
        c = config.optimizer
        self.config, self.device, self.step = config, device, 0
        self.model = Decoder(config.model).to(device)
        matrices = [p for p in self.model.parameters() if p.dim() == 2]
        scales = [p for p in self.model.parameters() if p.dim() == 1]
        groups = [{"params": matrices, "weight_decay": c.weight_decay}, {"params": scales, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, betas=(c.b1, c.b2), fused=True)
        self._compiled = torch.compile(self.model)
        self._distributed = distributed
        if distributed:
            self._compiled = nn.parallel.DistributedDataParallel(self._compiled, gradient_as_bucket_view=True)
        use_bf16 = config.model.precision == "bf16" or (config.model.precision == "auto" and device == "cuda")
        self._autocast = torch.autocast(device, torch.bfloat16, enabled=use_bf16)

    def to_device(self, ids: np.ndarray) -> torch.Tensor:
        """Copies integers to the device, without waiting for it."""
        tensor = torch.from_numpy(ids).long()
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device == "cuda" else tensor

    def compile(self) -> None:
        """Compiles by one micro-batch, which changes no weight."""
        ids = np.zeros((self.config.batch_size, self.config.model.context + 1), np.int64)
        self._backward(self.to_device(ids)).item()
        self.optimizer.zero_grad(set_to_none=True)

    def train(self, batches: Iterator[torch.Tensor], steps: int) -> float:
        """Trains for so many optimizer steps on micro-batches [B, T + 1], to their end; returns the last one's loss."""
        c = self.config
        for _ in range(steps):
            for group in self.optimizer.param_groups:
                group["lr"] = c.optimizer.learning_rate * lr_scale(c.optimizer, c.max_steps, self.step)
            for micro_batch in range(c.grad_accum_steps):
                if self._distributed:
                    self._compiled.require_backward_grad_sync = micro_batch == c.grad_accum_steps - 1
                loss = self._backward(next(batches))
            nn.utils.clip_grad_norm_(self.model.parameters(), c.optimizer.clip_norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
        return loss.item()

    def _backward(self, ids: torch.Tensor) -> torch.Tensor:
        with self._autocast:
            loss = self._compiled(ids[:, :-1], ids[:, 1:])
        (loss / self.config.grad_accum_steps).backward()
        return loss.detach()

    @torch.no_grad()
    def loss_sum(self, inputs: np.ndarray, targets: np.ndarray) -> float:
        """The sum of -ln p(target) over a validation batch, in nats; not compiled."""
        with self._autocast:
            return self.model(self.to_device(inputs), self.to_device(targets), reduction="sum").item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--batch", type=int, required=True, help="sequences of a micro-step")
    parser.add_argument("--accum", type=int, required=True, help="micro-steps of an optimizer step")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], required=True)
    parser.add_argument("--steps", type=int, required=True, help="optimizer steps of a timing")
    parser.add_argument("--devices", type=int, default=1, help="GPUs, each with this batch")
    args = parser.parse_args()
    if args.devices == 1:
        measure(args)
        return
    with temporary_folder("torch-llama") as folder:
        torch.multiprocessing.spawn(measure_one_of, (args, f"file://{folder}/store"), args.devices)


def measure_one_of(rank: int, args: argparse.Namespace, store: str) -> None:
    """`measure` in one process of several."""
    torch.cuda.set_device(rank)
    torch.distributed.init_process_group("nccl", store, rank=rank, world_size=args.devices)
    measure(args, rank)
    torch.distributed.destroy_process_group()


def measure(args: argparse.Namespace, rank: int = 0) -> None:
    """Trains, and prints the result if this is the first process."""
    config = from_config_dict(m2_60m.get_config())
    model = replace(config.model, precision={"float32": "float32", "bfloat16": "bf16"}[args.dtype])
    config = replace(config, batch_size=args.batch, grad_accum_steps=args.accum, model=model)
    peer = Peer(config, args.device, distributed=args.devices > 1)
    batches = cycle(torch.randint(model.vocab_size, (4, args.batch, model.context + 1), device=args.device))

    peer.train(batches, 2)
    timings = []
    for _ in range(3):
        began = time.perf_counter()
        peer.train(batches, args.steps)
        timings.append((time.perf_counter() - began) / (args.steps * args.accum))
    cuda = args.device == "cuda"
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = median(timings)
    rate = args.batch * model.context / seconds
    if rank == 0:
        print(json.dumps({"name": f"torch {torch.__version__}", "rate": rate, "ms": seconds * 1e3, "mb": peak / 1e6}))


if __name__ == "__main__":
    main()
