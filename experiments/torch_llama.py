"""The 60M preset as one would write it in PyTorch: the peer of `experiments/throughput.py`, which runs it.

    python -m experiments.torch_llama --device cuda --batch 32 --accum 2 --dtype bfloat16 --steps 20

torch.compile, scaled_dot_product_attention, fused AdamW, gradient clipping, autocast to bfloat16 where asked, and the
vocabulary padded to a multiple of 64. Prints one JSON line.
"""

import argparse
import json
import resource
import time
from statistics import median

import torch
from torch import nn
from torch.nn import functional as F

LAYERS, HEADS, WIDTH, MLP_WIDTH, CONTEXT, VOCAB, PADDED = 8, 8, 512, 2048, 1024, 50_257, 50_304


class Block(nn.Module):
    """RMSNorm, attention with RoPE; RMSNorm, SwiGLU."""

    def __init__(self):
        super().__init__()
        self.attention_norm = nn.RMSNorm(WIDTH, eps=1e-6)
        self.mlp_norm = nn.RMSNorm(WIDTH, eps=1e-6)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.output = nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate_up = nn.Linear(WIDTH, 2 * MLP_WIDTH, bias=False)
        self.down = nn.Linear(MLP_WIDTH, WIDTH, bias=False)

    def forward(self, x, cos, sin):
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, HEADS, WIDTH // HEADS))
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
    """The model; its forward pass gives the mean loss."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(PADDED, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH, eps=1e-6)
        for weight in self.parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=0.02)
        head_width = WIDTH // HEADS
        frequencies = 10_000 ** (-torch.arange(0, head_width, 2) / head_width)
        angles = torch.arange(CONTEXT)[:, None] * frequencies
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, ids, targets):
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = self.norm(x) @ self.embedding.weight.T
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--batch", type=int, required=True, help="sequences of a micro-step")
    parser.add_argument("--accum", type=int, required=True, help="micro-steps of an optimizer step")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], required=True)
    parser.add_argument("--steps", type=int, required=True, help="optimizer steps of a timing")
    args = parser.parse_args()

    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high" if args.device == "cuda" else "highest")
    model = Decoder().to(args.device)
    loss_of = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    batches = torch.randint(VOCAB, (4, args.batch, CONTEXT + 1), device=args.device)

    def train(steps):
        for micro_step in range(steps * args.accum):
            ids = batches[micro_step % 4]
            with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
                loss = loss_of(ids[:, :-1], ids[:, 1:]) / args.accum
            loss.backward()
            if (micro_step + 1) % args.accum == 0:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        return loss.item()

    train(2)
    timings = []
    for _ in range(3):
        began = time.perf_counter()
        train(args.steps)
        timings.append((time.perf_counter() - began) / (args.steps * args.accum))
    cuda = args.device == "cuda"
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = median(timings)
    rate = args.batch * CONTEXT / seconds
    print(json.dumps({"name": f"torch {torch.__version__}", "rate": rate, "ms": seconds * 1e3, "mb": peak / 1e6}))


if __name__ == "__main__":
    main()
