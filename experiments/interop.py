"""Compares a run's model in other programs with jaxlm: the largest difference in logits, gradients and texts.

    pip install -e ".[interop]"
    CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" pip install llama-cpp-python==0.3.36   # five minutes; optional
    python -m experiments.interop --workdir runs/quickstart

It compares the run's last checkpoint, and random weights in the shape of the 60M preset, as a Llama and as a Qwen3
(`model.qk_norm`), in float32 on the CPU. The difference of logits is the largest one at a position relative to the
largest logit there, at the worst position. The difference of gradients is defined likewise for each parameter. Programs
that are not installed are skipped.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import math
import sys
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.cleanup import temporary_folder
from jaxlm.config import Config, ModelConfig
from jaxlm.core.decoder import Decoder, init_params
from jaxlm.core.generate import generate
from jaxlm.core.model import loss_and_gradient, prepare_decode_params
from jaxlm.core.sampling import SamplingParams
from jaxlm.data.token_files import TokenFiles, bits_per_byte, val_batches
from jaxlm.data.tokenizer import Tokenizer, load_tokenizer
from jaxlm.interop.gguf import write_gguf
from jaxlm.interop.huggingface import named_tensors, write_model
from jaxlm.main import open_data
from jaxlm.run.load import Checkpoint, resolved, restore
from jaxlm.storage.jsonl import rows_up_to

GREEDY_TOKENS = 200
BITS = "val_bits_per_byte"
NEVER = -1  # no token has this id


@dataclass(frozen=True)
class Subject:
    """A model, and its files for other programs."""

    config: ModelConfig
    params: Any
    tokenizer: Tokenizer
    folder: Path  # in Hugging Face's format
    gguf: Path


def export(directory: Path, config: Config, params: Any, tokenizer: Tokenizer) -> Subject:
    """Writes `params` in both formats."""
    folder, file = write_model(directory / "model", config, params, tokenizer, ""), directory / "model.gguf"
    write_gguf(file, config.model, params, tokenizer, "f32")
    return Subject(config.model, params, tokenizer, folder, file)


def worst(actual: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference in a row of the last axis, relative to the largest value of this row; of the worst row."""
    scale = np.abs(expected).max(axis=-1)
    return float((np.abs(actual - expected).max(axis=-1) / np.where(scale > 0, scale, 1)).max())


def logits(subject: Subject, ids: np.ndarray) -> np.ndarray:
    """jaxlm's logits, [T, V], for ids [T]."""
    return np.asarray(jax.jit(Decoder(subject.config).apply)({"params": subject.params}, ids[None])[0])


def gradients(subject: Subject, ids: np.ndarray) -> dict[str, np.ndarray]:
    """jaxlm's gradients of the summed loss of ids [T], by Hugging Face's names."""
    run = jax.jit(partial(loss_and_gradient, subject.config))
    zeros = jax.tree.map(jnp.zeros_like, subject.params)
    _, gradient = run(subject.params, ids[None, :-1], ids[None, 1:], 1.0, zeros)
    return named_tensors(subject.config, gradient)


def greedy(subject: Subject, prompt: np.ndarray) -> list[int]:
    """jaxlm's greedy continuation, in a longer context if needed."""
    config = replace(subject.config, context=max(subject.config.context, len(prompt) + GREEDY_TOKENS))
    params = SamplingParams(np.float32(0))
    weights = prepare_decode_params(config, subject.params)
    (tokens_BN,) = generate(config, weights, [prompt.tolist()], params, jax.random.key(0), GREEDY_TOKENS, NEVER)
    return tokens_BN[0].tolist()


def of_transformers(subject: Subject, ids: np.ndarray, short: np.ndarray) -> Iterator[tuple[str, float]]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(subject.folder)
    with torch.no_grad():
        yield "logits", worst(model(torch.tensor(ids[None])).logits[0].numpy(), logits(subject, ids))

    short_logits = model(torch.tensor(short[None, :-1])).logits[0]
    torch.nn.functional.cross_entropy(short_logits, torch.tensor(short[1:]), reduction="sum").backward()
    theirs = {name: parameter.grad.numpy().ravel() for name, parameter in model.named_parameters()}
    ours = gradients(subject, short)
    assert theirs.keys() == ours.keys()
    yield "gradients", max(worst(theirs[name], ours[name].ravel()) for name in ours)

    model.generation_config.eos_token_id = None
    prompt = torch.tensor(short[None, :8])
    mask = torch.ones_like(prompt)
    written = model.generate(prompt, attention_mask=mask, do_sample=False, max_new_tokens=GREEDY_TOKENS)[0, 8:].tolist()
    yield f"greedy tokens of {GREEDY_TOKENS} that differ", differing(written, greedy(subject, short[:8]))

    tokenizer = AutoTokenizer.from_pretrained(subject.folder)
    yield texts_differing(subject, lambda text: tokenizer.encode(text, add_special_tokens=False))


def bits_per_byte_of_transformers(folder: Path, tokens: TokenFiles, context: int) -> float:
    """Bits per byte of the whole validation text, in the same sequences as in a run."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    loss_sum = count = 0.0
    with torch.no_grad():
        for inputs, targets in val_batches(tokens.val, context, 16):
            logits_NV = model(torch.tensor(inputs)).logits.flatten(0, 1)
            targets_N = torch.tensor(targets, dtype=torch.long).flatten()
            loss_sum += float(torch.nn.functional.cross_entropy(logits_NV, targets_N, ignore_index=-1, reduction="sum"))
            count += int((targets >= 0).sum())
    return bits_per_byte(loss_sum / count, int(count), tokens.text_bytes(tokens.val[1:]))


def of_mlx(subject: Subject, ids: np.ndarray, short: np.ndarray) -> Iterator[tuple[str, float]]:
    import mlx.core as mx
    from mlx_lm import load
    from mlx_lm.generate import generate_step

    mx.set_default_device(mx.cpu)
    model, tokenizer = load(str(subject.folder))
    yield "logits", worst(np.asarray(model(mx.array(ids[None])))[0], logits(subject, ids))
    steps = generate_step(mx.array(short[:8]), model, max_tokens=GREEDY_TOKENS)
    written = [int(token) for token, _ in steps]
    yield f"greedy tokens of {GREEDY_TOKENS} that differ", differing(written, greedy(subject, short[:8]))
    yield texts_differing(subject, lambda text: tokenizer.encode(text, add_special_tokens=False))


def of_llama_cpp(subject: Subject, ids: np.ndarray, short: np.ndarray) -> Iterator[tuple[str, float]]:
    """With a float32 cache: with the default, float16, logits differ by 1e-3."""
    import llama_cpp

    float32 = llama_cpp.GGML_TYPE_F32
    slots = max(len(ids), 8 + GREEDY_TOKENS)
    model = llama_cpp.Llama(
        str(subject.gguf), n_ctx=slots, n_batch=slots, logits_all=True, type_k=float32, type_v=float32, verbose=False
    )
    model.eval(ids.tolist())
    yield "logits", worst(model.scores[: len(ids)], logits(subject, ids))

    model.reset()
    model.eval(short[:8].tolist())
    written: list[int] = []
    for _ in range(GREEDY_TOKENS):
        written.append(int(model.scores[model.n_tokens - 1].argmax()))
        model.eval(written[-1:])
    yield f"greedy tokens of {GREEDY_TOKENS} that differ", differing(written, greedy(subject, short[:8]))
    yield texts_differing(subject, lambda text: model.tokenize(text.encode(), add_bos=False, special=False))


def differing(tokens: list[int], expected: list[int]) -> int:
    assert len(tokens) == len(expected) == GREEDY_TOKENS
    return sum(a != b for a, b in zip(tokens, expected, strict=True))


def texts_differing(subject: Subject, encode: Callable[[str], list[int]]) -> tuple[str, int]:
    """The number of `odd_texts` whose ids differ from tiktoken's."""
    texts = odd_texts()
    wrong = [text for text in texts if list(encode(text)) != subject.tokenizer.encode(text).tolist()]
    for text in wrong:
        print(f"different ids: {text[:70]!r}")
    return f"texts of {len(texts)} with different token ids", len(wrong)


def odd_texts() -> list[str]:
    """Unusual texts, code, and every character of Unicode."""
    folder = Path(__file__).parent
    texts = [*json.loads((folder / "odd_texts.json").read_text()), *(path.read_text() for path in folder.glob("*.py"))]
    assigned = [chr(code) for code in range(1, sys.maxunicode) if unicodedata.category(chr(code))[0] != "C"]
    return texts + [
        "".join(f"a{c}b {c}{c}" for c in assigned[first : first + 256]) for first in range(0, len(assigned), 256)
    ]


PEERS = {
    "transformers": of_transformers,
    "mlx_lm": of_mlx,
    "llama_cpp": of_llama_cpp,
}


def compare(subject: Subject, ids: np.ndarray) -> Iterator[tuple[str, str, float]]:
    """Yields program, compared quantity and difference; skips programs that are not installed."""
    for package, compare_with in PEERS.items():
        if importlib.util.find_spec(package) is None:
            yield package, "not installed", math.nan
            continue
        program = f"{package} {importlib.metadata.version(package.replace('llama_cpp', 'llama_cpp_python'))}"
        for compared, difference in compare_with(subject, ids, ids[:128]):
            yield program, compared, difference


def restore_on_cpu(workdir: Path, precision: str = "auto") -> Checkpoint:
    """The checkpoint of a run, with its model resolved for the CPU."""
    checkpoint = restore(workdir, None, "cpu")
    model = resolved(checkpoint.config.model, jax.local_devices(backend="cpu")[0], precision)
    return checkpoint._replace(config=replace(checkpoint.config, model=model))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="of a finished run")
    args = parser.parse_args()
    checkpoint = restore_on_cpu(args.workdir)
    step, config, params = checkpoint.step, checkpoint.config, checkpoint.params
    tokens = open_data(config)
    print("| model | program | compared | largest difference |\n|---|---|---|---|")

    def show(model: str, program: str, compared: str, difference: float) -> None:
        print(f"| {model} | {program} | {compared} | {difference:.2g} |", flush=True)

    with temporary_folder("interop") as directory:
        name = f"{args.workdir.name}, step {step:,}"
        trained = export(directory / "trained", config, params, checkpoint.tokenizer)
        for row in compare(trained, np.array(tokens.val[: config.model.context], np.int64)):
            show(name, *row)
        if step == config.max_steps:  # only then, the run has read the whole validation text
            *_, last = rows_up_to(args.workdir / "metrics.jsonl", step)
            bits = bits_per_byte_of_transformers(trained.folder, tokens, config.model.context)
            show(name, "transformers", f"bits per byte of the validation text: {bits:.6f}", abs(bits - last[BITS]))
        for name, qk_norm in (("60M shape, random weights", False), ("60M shape, random weights, qk_norm", True)):
            preset, params = random_preset(qk_norm)
            tokenizer = load_tokenizer(preset.model.vocab_size)
            ids = np.random.default_rng(0).integers(0, preset.model.vocab_size, preset.model.context)
            for row in compare(export(directory / name, preset, params, tokenizer), ids):
                show(name, *row)


def random_preset(qk_norm: bool) -> tuple[Config, Any]:
    """The initial weights of a run of the preset."""
    config = Config(model=ModelConfig(qk_norm=qk_norm, precision="float32", implementation="xla", remat=False))
    return config, random_params(config.model)


def random_params(model: ModelConfig) -> Any:
    """The initial weights of a model. The norms of queries and keys, which begin at 1, get random scales."""
    params = init_params(model, jax.random.key(0))
    for seed, name in enumerate(("query_norm", "key_norm")):
        if name in params["blocks"]:
            scales_LK = np.random.default_rng(seed).uniform(0.5, 2, params["blocks"][name].shape)
            params["blocks"][name] = jnp.float32(scales_LK)
    return params


if __name__ == "__main__":
    main()
