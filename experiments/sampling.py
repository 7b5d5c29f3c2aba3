"""Compares the sampling speed of the 60M model with transformers and llama.cpp.

    python -m experiments.sampling [--rounds 5]

The weights are random and the prompts have 4 tokens. It generates 128 greedy tokens of one sequence, and 100 tokens of
each of 10 sequences, sampled from the 50 most likely. The programs alternate within each round. It prints tokens/s
over all sequences, prefill included, and the ratio to each peer in the same round: medians, with the least and the
greatest of the rounds in brackets. The peers are the installed ones of `pip install torch transformers
llama-cpp-python gguf`. They run on the CPU, with a thread for each core that this process may use.
"""

import argparse
import contextlib
import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.cleanup import temporary_folder
from experiments.rounds import median_and_range, ratios
from jaxlm.config import ModelConfig
from jaxlm.core.decoder import init_params
from jaxlm.core.generate import generate
from jaxlm.core.model import prepare_decode_params
from jaxlm.core.sampling import SamplingParams
from jaxlm.data.tokenizer import load_tokenizer
from jaxlm.device import backend
from jaxlm.interop.gguf import write_gguf

PROMPT = [464, 3616, 286, 1204]
CASES = {"1 sequence": (1, 128, SamplingParams(0.0)), "10 sequences": (10, 100, SamplingParams(1.0, 50))}
THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
Generate = Callable[[int, int, SamplingParams], Any]  # number of sequences, tokens of each, how they are sampled


def jaxlm_generate(config: ModelConfig, params: Any) -> Generate:
    weights = prepare_decode_params(config, params)

    def run(sequences: int, tokens: int, sampling: SamplingParams) -> None:
        sampling = jax.tree.map(np.asarray, sampling)
        (generated,) = generate(config, weights, [PROMPT] * sequences, sampling, jax.random.key(0), tokens, -1)
        assert generated.shape == (sequences, tokens)

    return run


def transformers_generate(config: ModelConfig) -> Generate:
    import torch
    import transformers

    torch.set_num_threads(THREADS)
    sizes = {"hidden_size": config.width, "intermediate_size": config.mlp_width, "vocab_size": config.vocab_size}
    layers = {"num_hidden_layers": config.layers, "num_attention_heads": config.heads}
    llama = transformers.LlamaConfig(**sizes, **layers, tie_word_embeddings=True, max_position_embeddings=1024)
    model = transformers.LlamaForCausalLM(llama).eval()

    def run(sequences: int, tokens: int, sampling: SamplingParams) -> None:
        ids = torch.tensor([PROMPT] * sequences)
        options = {"do_sample": True, "top_k": sampling.top_k} if sampling.temperature else {"do_sample": False}
        length = {"max_new_tokens": tokens, "min_new_tokens": tokens, "pad_token_id": 0}
        with torch.inference_mode():
            generated = model.generate(ids, attention_mask=torch.ones_like(ids), **options, **length)
        assert generated.shape == (sequences, len(PROMPT) + tokens)

    return run


def llama_cpp_generate(config: ModelConfig, params: Any, dtype: str, folder: Path) -> Generate:
    import llama_cpp

    file = folder / f"{dtype}.gguf"
    write_gguf(file, config, params, load_tokenizer(config.vocab_size), dtype)
    model = llama_cpp.Llama(str(file), n_ctx=256, n_threads=THREADS, n_threads_batch=THREADS, verbose=False)

    def run(sequences: int, tokens: int, sampling: SamplingParams) -> None:
        model.reset()  # else it reuses the prompt's keys and values
        for _, _ in zip(range(tokens), model.generate(PROMPT, temp=0.0, repeat_penalty=1.0), strict=False):
            pass

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--platform", default="auto")
    args = parser.parse_args()
    device = backend.start(args.platform)
    config = backend.resolve(ModelConfig(), device)
    params = init_params(config, jax.random.key(0))
    names = ("float32", "bf16_matmul")
    programs = {f"jaxlm {name}": jaxlm_generate(dataclasses.replace(config, precision=name), params) for name in names}
    with temporary_folder("sampling") as folder:
        with contextlib.suppress(ImportError):
            programs["transformers float32"] = transformers_generate(config)
        with contextlib.suppress(ImportError):
            for dtype in ("f32", "f16"):
                programs[f"llama.cpp {dtype}"] = llama_cpp_generate(config, params, dtype, folder)
    print(f"jax {jax.__version__} on {backend.describe(device)}, peers with {THREADS} threads; tokens/s")
    for case, (sequences, tokens, sampling) in CASES.items():
        compared = {name: run for name, run in programs.items() if sequences == 1 or "llama.cpp" not in name}
        rates: dict[str, list[float]] = {name: [] for name in compared}
        for round_number in range(args.rounds + 1):
            for name, run in compared.items():
                start = time.perf_counter()
                run(sequences, tokens, sampling)
                if round_number > 0:  # the first round compiles
                    rates[name].append(sequences * tokens / (time.perf_counter() - start))
        peers = [name for name in rates if "jaxlm" not in name]
        print(f"\n| {case} | tokens/s |" + "".join(f" ratio to {peer} |" for peer in peers))
        print("|---|---|" + "---|" * len(peers))
        for name, values in rates.items():
            cells = [median_and_range(ratios(values, rates[peer])) for peer in peers]
            print(f"| {name} | {' | '.join([median_and_range(values, '{:.0f}'), *cells])} |")


if __name__ == "__main__":
    main()
