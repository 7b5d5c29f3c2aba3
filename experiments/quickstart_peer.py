"""Compares the quickstart with nanoGPT's character model: bits per byte of the same text, on the same machine.

    python -m experiments.quickstart_peer --seconds 180

It needs PyTorch (the CPU build is enough) and takes about nine minutes on two cores. Three runs follow one another:
`configs/quickstart.py` as a user starts it, the model and settings that nanoGPT's README gives for a CPU, and the best
settings found for that model in 180 seconds. Each is evaluated on the last 5% of the fiction. Every byte is predicted
once, from no more context than the model's. The last figure of a run is for all of that text, the others for an even
sample of it. Seconds are training time: for jaxlm with compilation, samples and checkpoints, for the peer without
evaluations.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from experiments.cleanup import temporary_folder
from jaxlm.data.corpus import open_corpus

VALIDATION = 0.05
CURVE_POINTS = 6
ROOT = Path(__file__).parent.parent

Curve = list[tuple[float, float]]  # (seconds of training, bits per byte)


@dataclass(frozen=True)
class Settings:
    """Settings of nanoGPT's character model. The learning rate decays to a tenth along half a cosine."""

    name: str
    layers: int
    learning_rate: float
    iterations: int
    heads: int = 4
    width: int = 128
    block: int = 64
    batch: int = 12
    warmup: int = 100


PEERS = (
    Settings("nanoGPT, its README's settings", layers=4, learning_rate=1e-3, iterations=2000),
    Settings("nanoGPT, tuned", layers=3, learning_rate=4e-3, iterations=3700),
)


class Block(nn.Module):
    """GPT-2's block as in nanoGPT, without biases and dropout."""

    def __init__(self, s: Settings):
        super().__init__()
        self.heads = s.heads
        self.attention_norm = nn.LayerNorm(s.width, bias=False)
        self.qkv = nn.Linear(s.width, 3 * s.width, bias=False)
        self.attention_out = nn.Linear(s.width, s.width, bias=False)
        self.mlp_norm = nn.LayerNorm(s.width, bias=False)
        self.up = nn.Linear(s.width, 4 * s.width, bias=False)
        self.mlp_out = nn.Linear(4 * s.width, s.width, bias=False)

    def forward(self, x):
        qkv = self.qkv(self.attention_norm(x)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in qkv)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.attention_out(attended)
        return x + self.mlp_out(F.gelu(self.up(self.mlp_norm(x))))


class CharacterModel(nn.Module):
    """nanoGPT's model: learned positions, tied input embedding and output head."""

    def __init__(self, s: Settings, characters: int):
        super().__init__()
        self.tokens = nn.Embedding(characters, s.width)
        self.positions = nn.Embedding(s.block, s.width)
        self.blocks = nn.Sequential(*(Block(s) for _ in range(s.layers)))
        self.norm = nn.LayerNorm(s.width, bias=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * s.layers) if "out" in name else 0.02)

    def forward(self, ids, targets):
        """The sum of -ln p(target), in nats."""
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        logits = self.norm(self.blocks(x)) @ self.tokens.weight.T
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def train_peer(s: Settings, text: str, seconds: float) -> Curve:
    """Trains nanoGPT's character model for `s.iterations`, but at most `seconds`."""
    torch.manual_seed(1337)
    alphabet = sorted(set(text))
    index = {character: i for i, character in enumerate(alphabet)}
    ids = torch.tensor([index[character] for character in text])
    cut = int(len(text) * (1 - VALIDATION))
    val_bytes = len(text[cut:].encode())
    train, val = ids[:cut], ids[cut - 1 :]  # with the character before it, so that the first one is predicted too

    model = CharacterModel(s, len(alphabet))
    matrices = [p for p in model.parameters() if p.dim() == 2]
    scales = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": scales, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99))
    curve: Curve = []
    spent = 0.0
    for step in range(s.iterations):
        began = time.monotonic()
        for group in optimizer.param_groups:
            group["lr"] = s.learning_rate * schedule(step, s)
        starts = torch.randint(len(train) - s.block, (s.batch, 1))
        windows = train[starts + torch.arange(s.block + 1)]
        loss = model(windows[:, :-1], windows[:, 1:]) / windows[:, 1:].numel()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        spent += time.monotonic() - began
        if spent >= seconds:
            break
        if spent >= seconds * (len(curve) + 1) / CURVE_POINTS:
            curve.append((spent, bits_per_byte(model, s, val, val_bytes, every=10)))
    return [*curve, (spent, bits_per_byte(model, s, val, val_bytes))]


def schedule(step: int, s: Settings) -> float:
    """The learning rate as a fraction of its peak."""
    if step < s.warmup:
        return (step + 1) / (s.warmup + 1)
    progress = (step - s.warmup) / (s.iterations - s.warmup)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def bits_per_byte(model: CharacterModel, s: Settings, val: torch.Tensor, val_bytes: int, every: int = 1) -> float:
    """Bits per byte of every `every`-th window, without overlap. With `every` 1 each character is predicted."""
    windows = val.unfold(0, s.block + 1, s.block)
    rest = val[len(windows) * s.block :][None]
    loss_sum = predicted = 0
    for batch in (*windows[::every].split(64), *([rest] if every == 1 and rest.shape[1] > 1 else [])):
        loss_sum += model(batch[:, :-1], batch[:, 1:]).item()
        predicted += batch[:, 1:].numel()
    return loss_sum / predicted * (len(val) - 1) / val_bytes / math.log(2)


def train_jaxlm() -> Curve:
    """Runs the quickstart as a user does; returns the curve that it recorded."""
    with temporary_folder("quickstart-peer") as workdir:
        command = [sys.executable, "-m", "jaxlm.main", "--config", "configs/quickstart.py", "--workdir", str(workdir)]
        subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
        rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(row["seconds"], row["val_bits_per_byte"]) for row in rows if "val_bits_per_byte" in row]


def print_table(runs: list[tuple[str, Curve]], seconds: float) -> None:
    """A row for each run: its last figure before each time, then its final one."""
    times = [seconds * point / CURVE_POINTS for point in range(1, CURVE_POINTS)]
    print("| bits per byte after | " + " | ".join(f"{limit:.0f} s" for limit in times) + " | the end | seconds |")
    print("|---|" + "---|" * (len(times) + 2))
    for name, curve in runs:
        cells = [next((f"{bits:.2f}" for at, bits in reversed(curve) if at <= limit), "-") for limit in times]
        end, bits = curve[-1]
        print(f"| {name} | " + " | ".join(cells) + f" | **{bits:.3f}** | {end:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=180, help="limit of each training run")
    seconds = parser.parse_args().seconds
    text = "".join(chunk.text for chunk in open_corpus("novels").train())
    runs = [("jaxlm, configs/quickstart.py", train_jaxlm())]
    runs += [(settings.name, train_peer(settings, text, seconds)) for settings in PEERS]
    print_table(runs, seconds)


if __name__ == "__main__":
    main()
