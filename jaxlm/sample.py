"""Generates text: python -m jaxlm.sample --workdir DIR --prompt "Once upon a time" [--step N]

`--model DIR` loads the Hugging Face folder of a Llama instead of a run. Without a prompt, on a terminal, it starts a
session that completes each line typed. The texts go to stdout, everything else to stderr.
"""

import copy
import itertools
import json
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from jaxlm.cli import ArgumentParser, run
from jaxlm.config import PLATFORMS, PRECISIONS, Config, SampleConfig
from jaxlm.core.generate import generate, up_to_end
from jaxlm.core.model import prepare_decode_params
from jaxlm.core.sampling import sampling_params
from jaxlm.data.tokenizer import encode_prompts, load_tokenizer
from jaxlm.errors import UsageError
from jaxlm.run.load import LoadedModel, load, restore
from jaxlm.run.quiet import quiet_libraries

STREAM_CHUNK = 8  # tokens generated between two updates of the terminal
PROMPT_BATCH = 16  # prompts completed at once
CHANGEABLE = ("temperature", "top_k", "top_p", "tokens", "seed")  # in a session
UNFINISHED = "\ufffd"  # what an incomplete character decodes to


def main(argv: list[str]) -> None:
    """Runs the command with the arguments `argv`. Raises UsageError."""
    args = _parser().parse_args(argv)
    _check(args)
    if args.model:
        if args.step is not None:
            raise UsageError("--step names a run's checkpoint: omit it with --model")
        loaded = load(args.model, args.platform, args.precision)
        print(f"Model in {args.model}", file=sys.stderr)
    else:
        checkpoint = restore(args.workdir, args.step, args.platform, args.precision)
        weights = prepare_decode_params(checkpoint.model, checkpoint.params)
        loaded = LoadedModel(checkpoint.model, weights, load_tokenizer(checkpoint.model.vocab_size))
        print(f"Checkpoint of step {checkpoint.step:,}", file=sys.stderr)
    prompts = _stdin_lines() if args.stdin else args.prompt or [""]
    on_terminal = sys.stdout.isatty() and not args.json
    if on_terminal and sys.stdin.isatty() and not args.stdin and not args.prompt:
        _session(loaded, args)
    elif on_terminal and len(prompts) == 1:
        _stream(loaded, prompts[0], args, 0)
    else:
        _print_all(loaded, prompts, args)


def _parser() -> ArgumentParser:
    description, sampling = "Generates text with a trained model.", _sampling_parser()
    parser = ArgumentParser(prog="python -m jaxlm.sample", description=description, parents=[sampling])
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--workdir", type=Path, help="a run's work directory")
    model.add_argument("--model", type=Path, help="the Hugging Face folder of a Llama, as jaxlm.export writes it")
    parser.add_argument("--step", type=int, help="which checkpoint of the run (the newest)")
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", action="append", help="beginning of the text; repeat for several texts")
    prompts.add_argument("--stdin", action="store_true", help="each line of stdin is a prompt")
    parser.add_argument("--json", action="store_true", help="write one JSON object per text, with its prompt")
    parser.add_argument("--platform", default="auto", choices=PLATFORMS, help="where to compute (%(default)s)")
    parser.add_argument("--precision", default="auto", choices=PRECISIONS, help="as a run's setting (%(default)s)")
    return parser


def _sampling_parser() -> ArgumentParser:
    """The flags that a session can change."""
    parser = ArgumentParser(prog="python -m jaxlm.sample", add_help=False)
    parser.add_argument("--tokens", type=int, default=200, help="maximum number of new tokens (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (%(default)s)")
    parser.add_argument(
        "--top_k", type=int, default=50, help="sample from the k most likely tokens; 0: all (%(default)s)"
    )
    parser.add_argument(
        "--top_p", type=float, default=1.0, help="sample from the most likely tokens of this probability (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random numbers (%(default)s)")
    return parser


def _check(args: Namespace) -> None:
    sample = SampleConfig(tokens=args.tokens, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
    Config(seed=args.seed, sample=sample)


def _stdin_lines() -> list[str]:
    try:
        return [line.removesuffix("\n") for line in sys.stdin]
    except UnicodeDecodeError as error:
        raise UsageError(f"stdin is not UTF-8 text ({error.reason}): convert it first") from error


def _print_all(loaded: LoadedModel, prompts: Sequence[str], args: Namespace) -> None:
    """Prints a text for each prompt, separated by blank lines, or a JSON object per line."""
    for first in range(0, len(prompts), PROMPT_BATCH):
        group = prompts[first : first + PROMPT_BATCH]
        ids = encode_prompts(loaded.tokenizer, group, loaded.config.context)
        (tokens_BN,) = _generate(loaded, ids, args, first, None)
        for index, (prompt, start, row) in enumerate(zip(group, ids, tokens_BN, strict=True), first):
            text = _decode(loaded, prompt, start, row)
            if args.json:
                print(json.dumps({"prompt": prompt, "text": text}))
            else:
                print("\n" * (index > 0) + text)
        sys.stdout.flush()


def _stream(loaded: LoadedModel, prompt: str, args: Namespace, index: int) -> None:
    """Prints a text while it is generated; `index` selects its random numbers."""
    (start,) = encode_prompts(loaded.tokenizer, [prompt], loaded.config.context)
    nothing = np.zeros((1, 0), np.int32)
    parts = itertools.chain([nothing], _generate(loaded, [start], args, index, STREAM_CHUNK))
    shown = text = ""
    for tokens_1N in itertools.accumulate(parts, lambda before, part: np.concatenate([before, part], axis=1)):
        text = _decode(loaded, prompt, start, tokens_1N[0])
        whole = text.rstrip(UNFINISHED)
        print(whole[len(shown) :], end="", flush=True)
        shown = whole
    print(text[len(shown) :])


def _session(loaded: LoadedModel, args: Namespace) -> None:
    """Reads prompts and completes them until the input ends (Ctrl-D)."""
    commands = ", ".join(f"/{name} {getattr(args, name)}" for name in CHANGEABLE)
    keys = "Ctrl-C ends a text, Ctrl-D the session"
    print(f"Type the beginning of a text. {commands} change the sampling; {keys}.", file=sys.stderr)
    for index in itertools.count():
        print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = sys.stdin.readline()
            if not line:
                print(file=sys.stderr)
                return
            if line.startswith("/"):
                args = _changed(args, line.split())
            else:
                _stream_until_interrupted(loaded, line.removesuffix("\n"), args, index)
        except UnicodeDecodeError as error:
            print(f"error: the line is not UTF-8 ({error.reason})", file=sys.stderr)
        except UsageError as error:
            print(f"error: {error}", file=sys.stderr)


def _changed(args: Namespace, words: Sequence[str]) -> Namespace:
    """`args` with the change of a line such as /temperature 0.8. Raises UsageError."""
    name = words[0].removeprefix("/")
    if name not in CHANGEABLE or len(words) != 2:
        raise UsageError(f"commands are /{', /'.join(CHANGEABLE)}, each with a value")
    changed = _sampling_parser().parse_args([f"--{name}={words[1]}"], copy.copy(args))
    _check(changed)
    return changed


def _stream_until_interrupted(loaded: LoadedModel, prompt: str, args: Namespace, index: int) -> None:
    try:
        _stream(loaded, prompt, args, index)
    except KeyboardInterrupt:
        print()


def _generate(
    loaded: LoadedModel, ids: Sequence[Sequence[int]], args: Namespace, index: int, chunk: int | None
) -> Iterator[np.ndarray]:
    params = sampling_params(args)
    key = jax.random.fold_in(jax.random.PRNGKey(args.seed), index)
    config, weights, tokenizer = loaded
    return generate(config, weights, ids, params, key, args.tokens, tokenizer.end_of_text, chunk)


def _decode(loaded: LoadedModel, prompt: str, start: Sequence[int], row: np.ndarray) -> str:
    """The text of the prompt and the completion; the ids `start` of an empty prompt are no text."""
    completion = up_to_end(row, loaded.tokenizer.end_of_text)
    return loaded.tokenizer.decode([*(start if prompt else ()), *completion])


if __name__ == "__main__":
    quiet_libraries()
    run(main)
