"""The command that writes: python -m jaxlm.sample --workdir DIR --prompt "Once upon a time" [--step N]

The text goes to stdout, everything else to stderr.
"""

import codecs
import dataclasses
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from jaxlm import backend
from jaxlm.checkpoint import DIRECTORY, Checkpoints
from jaxlm.command import ArgumentParser, run
from jaxlm.config import PLATFORMS, Config, ModelConfig, SampleConfig, from_config_dict
from jaxlm.errors import RequestError
from jaxlm.generate import encode_prompts, generate, up_to_end
from jaxlm.model import init_params, unstack
from jaxlm.sampling import Choice
from jaxlm.tokenizer import Tokenizer, load_tokenizer

STREAM_CHUNK = 8  # tokens between two looks at the terminal


def restore(workdir: Path, step: int | None, platform: str) -> tuple[Config, Any, int]:
    """The settings (dtype resolved) and parameters of a checkpoint, the newest without `step`; and its step.

    Raises:
        RequestError: there is none, or not this one.
    """
    if not (workdir / DIRECTORY).is_dir():
        raise RequestError(f"{workdir} holds no checkpoints: name the --workdir of a run")
    device = backend.start(platform)
    checkpoints = Checkpoints(workdir)
    steps = checkpoints.steps()
    if not steps:
        raise RequestError(f"{workdir} holds no whole checkpoint yet: wait for the first")
    if step is not None and step not in steps:
        raise RequestError(f"there is no checkpoint of step {step}: choose from {', '.join(map(str, steps))}")

    def load(step: int) -> tuple[Config, Any, int]:
        config = from_config_dict(checkpoints.meta(step)["config"])
        model = backend.resolve(dataclasses.replace(config.model, dtype="auto", attention="auto"), device)
        like = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
        params = checkpoints.params(step, like, SingleDeviceSharding(device))
        return dataclasses.replace(config, model=model), params, step

    restored, skipped = checkpoints.newest(load, steps if step is None else [step])
    for reason in skipped:
        print(f"Skipped {reason}", file=sys.stderr)
    return restored


def main(argv: list[str]) -> None:
    """Runs the command with `argv`, the words after its name. Raises RequestError."""
    parser = ArgumentParser(prog="python -m jaxlm.sample", description="Writes text with a checkpoint of a run.")
    parser.add_argument("--workdir", type=Path, required=True, help="the run's work directory")
    parser.add_argument("--prompt", action="append", help="how the text begins; again for several texts")
    parser.add_argument("--step", type=int, help="which checkpoint (the newest)")
    parser.add_argument("--tokens", type=int, default=200, help="at most so many new tokens (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (%(default)s)")
    parser.add_argument("--top_k", type=int, default=50, help="draw from the k likeliest; 0: all (%(default)s)")
    parser.add_argument("--top_p", type=float, default=1.0, help="draw from the likeliest of this share (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another text (%(default)s)")
    parser.add_argument("--platform", default="auto", choices=PLATFORMS, help="what computes (%(default)s)")
    args = parser.parse_args(argv)
    SampleConfig(tokens=args.tokens, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)  # checks them
    if not 0 <= args.seed < 2**31:
        raise RequestError(f"--seed is {args.seed}: it must be between 0 and 2147483647")
    config, params, step = restore(args.workdir, args.step, args.platform)
    print(f"Checkpoint of step {step:,}", file=sys.stderr)
    tokenizer = load_tokenizer(config.model.vocab_size)
    prompts = args.prompt or [""]
    streaming = len(prompts) == 1 and sys.stdout.isatty()
    parts = _generate(config.model, params, tokenizer, prompts, args, STREAM_CHUNK if streaming else None)
    if streaming:
        _print_as_it_comes(prompts[0], (part[0] for part in parts), tokenizer)
        return
    (tokens_BN,) = parts
    texts = [up_to_end(row, tokenizer.end_of_text) for row in tokens_BN]
    print("\n\n".join(prompt + tokenizer.decode(ids) for prompt, ids in zip(prompts, texts, strict=True)))


def _generate(
    model: ModelConfig, params: Any, tokenizer: Tokenizer, prompts: list[str], args: Namespace, chunk: int | None
) -> Iterator[np.ndarray]:
    choice = Choice(np.float32(args.temperature), np.int32(args.top_k), np.float32(args.top_p))
    ids = encode_prompts(tokenizer, prompts, model.context)
    key = jax.random.key(args.seed)
    return generate(model, unstack(model, params), ids, choice, key, args.tokens, tokenizer.end_of_text, chunk)


def _print_as_it_comes(prompt: str, parts: Iterator[np.ndarray], tokenizer: Tokenizer) -> None:
    characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
    print(prompt, end="", flush=True)
    for part in parts:
        ids = up_to_end(part, tokenizer.end_of_text)
        print(characters.decode(tokenizer.decode_bytes(ids)), end="", flush=True)
    print(characters.decode(b"", final=True))


if __name__ == "__main__":
    run(main)
