"""How fast the 60M model writes, beside transformers and llama.cpp: python -m experiments.sampling [--rounds 5]

Random weights, prompts of 4 tokens: 128 greedy tokens of one text, and 100 tokens of 10 texts, drawn from the 50 most
likely. One program after the other, in turns; prints tokens/s in all, the median of the rounds, and the
ratio to each peer, in which the prompt's pass counts. The peers are those of `pip install torch transformers
llama-cpp-python gguf` that are there; they compute on the CPU, with as many threads as there are cores.
"""

import argparse
import contextlib
import dataclasses
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.core.generate import generate
from jaxlm.core.model import init_params, prepare_decode_params
from jaxlm.core.sampling import SamplingParams
from jaxlm.device import backend
from jaxlm.interop.gguf import write_gguf

PROMPT = [464, 3616, 286, 1204]
CASES = {"1 text": (1, 128, SamplingParams(0.0)), "10 texts": (10, 100, SamplingParams(1.0, 50))}
Writer = Callable[[int, int, SamplingParams], Any]  # texts, tokens of each, how they are chosen


def jaxlm_writer(config: ModelConfig, params: Any) -> Writer:
    weights = prepare_decode_params(config, params)

    def write(texts: int, tokens: int, choice: SamplingParams) -> None:
        choice = jax.tree.map(np.asarray, choice)
        (written,) = generate(config, weights, [PROMPT] * texts, choice, jax.random.key(0), tokens, -1)
        assert written.shape == (texts, tokens)

    return write


def transformers_writer(config: ModelConfig) -> Writer:
    import torch
    import transformers

    torch.set_num_threads(os.cpu_count() or 1)
    sizes = {"hidden_size": config.width, "intermediate_size": config.mlp_width, "vocab_size": config.vocab_size}
    layers = {"num_hidden_layers": config.layers, "num_attention_heads": config.heads}
    llama = transformers.LlamaConfig(**sizes, **layers, tie_word_embeddings=True, max_position_embeddings=1024)
    model = transformers.LlamaForCausalLM(llama).eval()

    def write(texts: int, tokens: int, choice: SamplingParams) -> None:
        ids = torch.tensor([PROMPT] * texts)
        how = {"do_sample": True, "top_k": choice.top_k} if choice.temperature else {"do_sample": False}
        length = {"max_new_tokens": tokens, "min_new_tokens": tokens, "pad_token_id": 0}
        with torch.inference_mode():
            written = model.generate(ids, attention_mask=torch.ones_like(ids), **how, **length)
        assert written.shape == (texts, len(PROMPT) + tokens)

    return write


def llama_cpp_writer(config: ModelConfig, params: Any, dtype: str, place: Path) -> Writer:
    import llama_cpp

    file = place / f"{dtype}.gguf"
    write_gguf(file, config, params, dtype)
    threads = os.cpu_count()
    model = llama_cpp.Llama(str(file), n_ctx=256, n_threads=threads, n_threads_batch=threads, verbose=False)

    def write(texts: int, tokens: int, choice: SamplingParams) -> None:
        model.reset()  # or it takes the prompt's keys and values from the last time
        for _, _ in zip(range(tokens), model.generate(PROMPT, temp=0.0, repeat_penalty=1.0), strict=False):
            pass

    return write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--platform", default="auto")
    args = parser.parse_args()
    device = backend.start(args.platform)
    config = backend.resolve(ModelConfig(), device)
    params = init_params(config, jax.random.key(0))
    names = ("float32", "bf16_matmul")
    writers = {f"jaxlm {name}": jaxlm_writer(dataclasses.replace(config, precision=name), params) for name in names}
    with tempfile.TemporaryDirectory() as place:
        with contextlib.suppress(ImportError):
            writers["transformers float32"] = transformers_writer(config)
        with contextlib.suppress(ImportError):
            for dtype in ("f32", "f16"):
                writers[f"llama.cpp {dtype}"] = llama_cpp_writer(config, params, dtype, Path(place))
    print(f"jax {jax.__version__} on {backend.describe(device)}; tokens/s")
    for case, (texts, tokens, choice) in CASES.items():
        able = {name: write for name, write in writers.items() if texts == 1 or "llama.cpp" not in name}
        rates: dict[str, list[float]] = {name: [] for name in able}
        for count in range(args.rounds + 1):
            for name, write in able.items():
                start = time.perf_counter()
                write(texts, tokens, choice)
                if count:  # the first time, things are compiled
                    rates[name].append(texts * tokens / (time.perf_counter() - start))
        middle = {name: median(its) for name, its in rates.items()}
        peers = [name for name in middle if "jaxlm" not in name]
        print(f"\n| {case} | tokens/s |" + "".join(f" of {peer} |" for peer in peers))
        print("|---|---|" + "---|" * len(peers))
        for name, rate in middle.items():
            print(f"| {name} | {rate:.0f} |" + "".join(f" {rate / middle[peer]:.2f} |" for peer in peers))


if __name__ == "__main__":
    main()
