"""The command that writes: python -m jaxlm.sample --workdir DIR --prompt "Once upon a time" [--step N]

`--model DIR` takes the Hugging Face folder of a Llama instead of a run. Without a prompt, on a terminal, it is a
session: each line is how a text begins. The texts go to stdout, everything else to stderr.
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
from jaxlm.config import PLATFORMS, PRECISIONS, SampleConfig
from jaxlm.core.generate import generate, up_to_end
from jaxlm.core.model import prepare_decode_params
from jaxlm.core.sampling import sampling_params
from jaxlm.data.tokenizer import encode_prompts, load_tokenizer
from jaxlm.errors import UsageError
from jaxlm.run.load import LoadedModel, load, restore
from jaxlm.run.quiet import quiet_libraries

STREAM_CHUNK = 8  # tokens between two looks at the terminal
TOGETHER = 16  # prompts of stdin that are continued at once
CHANGEABLE = ("temperature", "top_k", "top_p", "tokens", "seed")  # in a session
UNFINISHED = "\ufffd"  # what a character decodes to while some of its bytes are missing


def main(argv: list[str]) -> None:
    """Runs the command with `argv`, the words after its name. Raises UsageError."""
    args = _parser().parse_args(argv)
    _check(args)
    if args.step is not None and args.model:
        raise UsageError("--step is of a run's checkpoints: leave it out with --model")
    if args.model:
        writer = load(args.model, args.platform, args.precision)
        print(f"Model in {args.model}", file=sys.stderr)
    else:
        found = restore(args.workdir, args.step, args.platform, args.precision)
        weights = prepare_decode_params(found.model, found.params)
        writer = LoadedModel(found.model, weights, load_tokenizer(found.model.vocab_size))
        print(f"Checkpoint of step {found.step:,}", file=sys.stderr)
    on_terminal = sys.stdout.isatty() and not args.json
    if args.stdin:
        _write_all(writer, _stdin_lines(), args)
    elif not args.prompt and on_terminal and sys.stdin.isatty():
        _session(writer, args)
    elif len(args.prompt or [""]) == 1 and on_terminal:
        _stream(writer, args.prompt[0] if args.prompt else "", args, 0)
    else:
        _write_all(writer, args.prompt or [""], args)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m jaxlm.sample", description="Writes text with a trained model.", parents=[_writing_parser()]
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--workdir", type=Path, help="a run's work directory")
    model.add_argument("--model", type=Path, help="the Hugging Face folder of a Llama, as jaxlm.export writes it")
    parser.add_argument("--step", type=int, help="which checkpoint of the run (the newest)")
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", action="append", help="how the text begins; again for several texts")
    prompts.add_argument("--stdin", action="store_true", help="each line of stdin is how a text begins")
    parser.add_argument("--json", action="store_true", help="a JSON object for each text, with its prompt, on a line")
    parser.add_argument("--platform", default="auto", choices=PLATFORMS, help="what computes (%(default)s)")
    parser.add_argument(
        "--precision", default="auto", choices=PRECISIONS, help="as model.precision of a run (%(default)s)"
    )
    return parser


def _writing_parser() -> ArgumentParser:
    """Of the flags that a session can change."""
    parser = ArgumentParser(prog="python -m jaxlm.sample", add_help=False)
    parser.add_argument("--tokens", type=int, default=200, help="at most so many new tokens (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (%(default)s)")
    parser.add_argument(
        "--top_k", type=int, default=50, help="draw from the k most likely tokens; 0: all (%(default)s)"
    )
    parser.add_argument(
        "--top_p", type=float, default=1.0, help="draw from the most likely tokens of this share (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed, another text (%(default)s)")
    return parser


def _check(args: Namespace) -> None:
    SampleConfig(tokens=args.tokens, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)  # checks them
    if not 0 <= args.seed < 2**31:
        raise UsageError(f"--seed is {args.seed}: it must be between 0 and 2147483647")


def _stdin_lines() -> list[str]:
    try:
        return [line.removesuffix("\n") for line in sys.stdin]
    except UnicodeDecodeError as error:
        raise UsageError(f"stdin is not UTF-8 text ({error.reason}): convert it first") from error


def _write_all(writer: LoadedModel, prompts: Sequence[str], args: Namespace) -> None:
    """Prints a text for each prompt, some at a time; blank lines between them, or each a JSON object on a line."""
    for first in range(0, len(prompts), TOGETHER):
        group = prompts[first : first + TOGETHER]
        ids = encode_prompts(writer.tokenizer, group, writer.config.context)
        (tokens_BN,) = _generate(writer, ids, args, first, None)
        for index, (prompt, start, row) in enumerate(zip(group, ids, tokens_BN, strict=True), first):
            text = _decode(writer, prompt, start, row)
            if args.json:
                print(json.dumps({"prompt": prompt, "text": text}))
            else:
                print("\n" * (index > 0) + text)
        sys.stdout.flush()


def _stream(writer: LoadedModel, prompt: str, args: Namespace, turn: int) -> None:
    """Prints a text as it comes."""
    (start,) = encode_prompts(writer.tokenizer, [prompt], writer.config.context)
    nothing = np.zeros((1, 0), np.int32)
    parts = itertools.chain([nothing], _generate(writer, [start], args, turn, STREAM_CHUNK))
    shown = text = ""
    for tokens_1N in itertools.accumulate(parts, lambda before, part: np.concatenate([before, part], axis=1)):
        text = _decode(writer, prompt, start, tokens_1N[0])
        whole = text.rstrip(UNFINISHED)
        print(whole[len(shown) :], end="", flush=True)
        shown = whole
    print(text[len(shown) :])


def _session(writer: LoadedModel, args: Namespace) -> None:
    """Asks for beginnings and continues them until the end of the input (Ctrl-D)."""
    commands = ", ".join(f"/{name} {getattr(args, name)}" for name in CHANGEABLE)
    print(f"Type how a text begins. {commands} change how it goes on; Ctrl-C ends a text, Ctrl-D all.", file=sys.stderr)
    for turn in itertools.count():
        print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = sys.stdin.readline()
            if not line:
                print(file=sys.stderr)
                return
            if line.startswith("/"):
                args = _changed(args, line.split())
            else:
                _stream_until_interrupted(writer, line.removesuffix("\n"), args, turn)
        except UnicodeDecodeError as error:
            print(f"error: that is not UTF-8 ({error.reason})", file=sys.stderr)
        except UsageError as error:
            print(f"error: {error}", file=sys.stderr)


def _changed(args: Namespace, words: Sequence[str]) -> Namespace:
    """`args` with what a line such as /temperature 0.8 asks for."""
    name = words[0].removeprefix("/")
    if name not in CHANGEABLE or len(words) != 2:
        raise UsageError(f"there are /{', /'.join(CHANGEABLE)}, each with its value")
    changed = _writing_parser().parse_args([f"--{name}={words[1]}"], copy.copy(args))
    _check(changed)
    return changed


def _stream_until_interrupted(writer: LoadedModel, prompt: str, args: Namespace, turn: int) -> None:
    try:
        _stream(writer, prompt, args, turn)
    except KeyboardInterrupt:
        print()


def _generate(
    writer: LoadedModel, ids: Sequence[Sequence[int]], args: Namespace, turn: int, chunk: int | None
) -> Iterator[np.ndarray]:
    choice = sampling_params(args)
    key = jax.random.fold_in(jax.random.PRNGKey(args.seed), turn)
    config, weights, tokenizer = writer
    return generate(config, weights, ids, choice, key, args.tokens, tokenizer.end_of_text, chunk)


def _decode(writer: LoadedModel, prompt: str, start: Sequence[int], row: np.ndarray) -> str:
    """The text of a prompt's ids (those of an empty one are no text) and of what was written behind them."""
    written = up_to_end(row, writer.tokenizer.end_of_text)
    return writer.tokenizer.decode([*(start if prompt else ()), *written])


if __name__ == "__main__":
    quiet_libraries()
    run(main)
