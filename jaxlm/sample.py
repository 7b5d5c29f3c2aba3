"""Generates text: python -m jaxlm.sample --workdir DIR --prompt "Once upon a time" [--step N]

`--model DIR` loads the Hugging Face folder of a Llama or a Qwen3 instead of a run. Without a prompt, each line of a
pipe is one, and on a terminal a session starts. The texts go to stdout, everything else to stderr.
"""

import difflib
import itertools
import json
import os
import select
import stat
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, partial
from typing import NamedTuple

import jax
import numpy as np

from jaxlm.cli import ArgumentParser, path, run
from jaxlm.config import PLATFORMS, PRECISIONS, Config, ModelConfig, SampleConfig
from jaxlm.core.generate import generate, up_to_end
from jaxlm.core.model import prepare_decode_params
from jaxlm.core.sampling import sampling_params
from jaxlm.data.tokenizer import Tokenizer, encode_prompts
from jaxlm.errors import RunError, UsageError
from jaxlm.run.load import LoadedModel, load, load_run, param_shapes
from jaxlm.run.quiet import quiet_libraries
from jaxlm.terminal import printable

STREAM_CHUNK = 8  # tokens generated between two updates of the terminal
PROMPT_BATCH = 16  # prompts completed at once
READ_BYTES = 1 << 16  # of stdin at once
CHANGEABLE = ("temperature", "top_k", "top_p", "tokens", "seed")  # in a session
COMMANDS = ("help", "more", "again", "quit", *CHANGEABLE)
UNFINISHED = "\ufffd"  # what an incomplete character decodes to
GREETING = "This model continues texts and is no chat. Type how a text starts; /help shows what else there is."
HELP = """\
TEXT           starts a text, which the model continues
Enter          continues the text so far
/more WORDS    continues it with these words
/again         writes the last part again, with the next seed
/seed 0        changes a flag; likewise /tokens, /temperature, /top_k and /top_p; without a value, shows it
/quit          ends the session, as Ctrl-D does; Ctrl-C ends a text"""


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
        step, loaded = load_run(args.workdir, args.step, args.platform, args.precision, partial(_compile, args))
        print(f"Checkpoint of step {step:,}", file=sys.stderr)
    if args.stdin:
        _print_all(loaded, _from_stdin(loaded), args)
    elif args.prompt:
        _print_all(loaded, _given(loaded, args.prompt), args)
    elif _stdin_has_lines():
        print("Each line of stdin is a prompt", file=sys.stderr)
        groups = _from_stdin(loaded)
        first = next(groups, _given(loaded, [""])[0])
        _print_all(loaded, itertools.chain([first], groups), args)
    elif args.json or not (sys.stdout.isatty() and sys.stdin.isatty()):
        _print_all(loaded, _given(loaded, [""]), args)
    else:
        Session(loaded, args).run()


def _parser() -> ArgumentParser:
    description, sampling = "Generates text with a trained model.", _sampling_parser()
    parser = ArgumentParser(prog="python -m jaxlm.sample", description=description, parents=[sampling])
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--workdir", type=path, help="a run's work directory")
    model.add_argument(
        "--model", type=path, help="the Hugging Face folder of a Llama or a Qwen3, as jaxlm.export writes it"
    )
    parser.add_argument("--step", type=int, help="which checkpoint of the run (the best, or the newest)")
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", action="append", help="beginning of the text; repeat for several texts")
    prompts.add_argument("--stdin", action="store_true", help="each line of stdin is a prompt, answered as it comes")
    parser.add_argument("--json", action="store_true", help="write one JSON object per text, with its prompt")
    parser.add_argument("--platform", default="auto", choices=PLATFORMS, help="where to compute (%(default)s)")
    parser.add_argument("--precision", default="auto", choices=PRECISIONS, help="as a run's setting (%(default)s)")
    return parser


def _sampling_parser() -> ArgumentParser:
    """The flags that a session can change."""
    parser = ArgumentParser(prog="python -m jaxlm.sample", add_help=False)
    parser.add_argument("--tokens", type=int, default=200, help="new tokens at most (%(default)s)")
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
    try:
        sample = SampleConfig(tokens=args.tokens, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
        Config(seed=args.seed, sample=sample)
    except UsageError as error:
        raise UsageError(str(error).removeprefix("sample.")) from error


def _stdin_has_lines() -> bool:
    """Whether stdin is a pipe, a socket or a file, and no terminal or /dev/null."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):  # it is closed
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or stat.S_ISREG(mode)


class Prompt(NamedTuple):
    """The beginning of a text."""

    number: int  # selects its random numbers
    text: str
    ids: list[int]
    shown: str = ""  # what of it a terminal shows already


def _encode(loaded: LoadedModel, number: int, text: str) -> Prompt:
    (ids,) = encode_prompts(loaded.tokenizer, [text], loaded.config.context)
    return Prompt(number, text, ids)


def _given(loaded: LoadedModel, texts: Sequence[str]) -> list[list[Prompt]]:
    """The prompts of the flags, in groups. Raises UsageError if one does not fit."""
    prompts = [_encode(loaded, number, text) for number, text in enumerate(texts)]
    return [prompts[i : i + PROMPT_BATCH] for i in range(0, len(prompts), PROMPT_BATCH)]


def _from_stdin(loaded: LoadedModel) -> Iterator[list[Prompt]]:
    """The prompts of stdin, in groups. Names lines that do not fit on stderr, and raises UsageError at the end."""
    count = unfit = 0
    for lines in _line_groups(sys.stdin.fileno()):
        group = []
        for number, line in enumerate(lines, count):
            try:
                text = line.removesuffix(b"\r").decode("utf-8" if number else "utf-8-sig")
                group.append(_encode(loaded, number, text))
            except (UnicodeDecodeError, UsageError) as error:
                reason = f"it is not UTF-8 ({error.reason})" if isinstance(error, UnicodeDecodeError) else error
                print(f"error: line {number + 1}: {reason}", file=sys.stderr)
        count, unfit = count + len(lines), unfit + len(lines) - len(group)
        if group:
            yield group
    if unfit:
        raise UsageError(f"{unfit} of {count} lines have no text: correct the lines named above")


def _line_groups(file: int) -> Iterator[list[bytes]]:
    """The lines of a file descriptor, without their ends, as they come: at most PROMPT_BATCH at once.

    It waits for the first line of a group, but for no further one.
    """
    lines: list[bytes] = []
    rest, ended = b"", False
    while lines or not ended:
        while not ended and (not lines or (len(lines) < PROMPT_BATCH and select.select([file], [], [], 0)[0])):
            try:
                part = os.read(file, READ_BYTES)
            except OSError as error:
                raise UsageError(f"cannot read stdin ({error.strerror}): give it a file or a pipe") from error
            *whole, rest = (rest + part).split(b"\n")
            ended = not part
            lines += [*whole, rest] if ended and rest else whole
        if lines:
            yield lines[:PROMPT_BATCH]
        lines = lines[PROMPT_BATCH:]


def _print_all(loaded: LoadedModel, groups: Iterable[Sequence[Prompt]], args: Namespace) -> None:
    """Prints a text for each prompt, separated by blank lines, or a JSON object per line."""
    on_terminal, separators = sys.stdout.isatty(), itertools.chain([""], itertools.repeat("\n"))
    for group in groups:
        if _streams(group, args):
            print(end=next(separators))
            _stream(loaded, group[0], args, [])
            continue
        (tokens_BN,) = _generate(loaded, group, args, None)
        for prompt, row in zip(group, tokens_BN, strict=True):
            text = _decode(loaded, prompt, row)
            if args.json:
                print(json.dumps({"prompt": prompt.text, "text": text}))
            else:
                print(next(separators) + (printable(text) if on_terminal else text))
        sys.stdout.flush()


def _compile(args: Namespace, model: ModelConfig, tokenizer: Tokenizer) -> None:
    """Compiles the programs for the texts of the flags or of a session, or reads them from the cache.

    It runs them with weights that are NaN, with which a text ends at once. Does nothing if the prompts come from stdin.
    Texts raise again what it raises.
    """
    if args.stdin or (not args.prompt and _stdin_has_lines()):
        return
    device = jax.local_devices()[0]
    nan = cache(lambda shape, dtype: jax.device_put(np.full(shape, np.nan, dtype), device))  # shared, to save memory
    shapes = jax.eval_shape(partial(prepare_decode_params, model), param_shapes(model))
    weights = jax.tree.map(lambda leaf: nan(leaf.shape, leaf.dtype), shapes)
    loaded = LoadedModel(model, weights, tokenizer)
    group = _given(loaded, args.prompt or [""])[0]
    list(_generate(loaded, group, args, STREAM_CHUNK if _streams(group, args) else None))


def _streams(group: Sequence[Prompt], args: Namespace) -> bool:
    """Whether a terminal shows the text of a group while it is generated."""
    return sys.stdout.isatty() and len(group) == 1 and not args.json


def _stream(loaded: LoadedModel, prompt: Prompt, args: Namespace, new: list[int]) -> None:
    """Prints a text on a terminal while it is generated, and appends its tokens to `new`."""
    shown, nothing = prompt.shown, np.zeros((1, 0), np.int32)
    text = shown
    for tokens_1N in itertools.chain([nothing], _generate(loaded, [prompt], args, STREAM_CHUNK)):
        new += tokens_1N[0].tolist()
        text = printable(_decode(loaded, prompt, np.array(new, np.int32)))
        whole = text.rstrip(UNFINISHED)
        print(whole[len(shown) :], end="", flush=True)
        shown = whole
    print(text[len(shown) :])


class Session:
    """What is typed and written on a terminal."""

    def __init__(self, loaded: LoadedModel, args: Namespace):
        self.loaded, self.args = loaded, args
        self.prompt: Prompt | None = None  # of the last part that was written
        self.new: list[int] = []  # its tokens

    def run(self) -> None:
        """Obeys each line that is typed, until /quit or the end of the input."""
        print(GREETING, file=sys.stderr)
        while True:
            print("> ", end="", file=sys.stderr, flush=True)
            try:
                line = sys.stdin.readline()
                if not line:
                    print(file=sys.stderr)
                if not line or line.split()[:1] == ["/quit"]:
                    return
                self._obey(line.removesuffix("\n"))
            except UnicodeDecodeError as error:
                print(f"error: the line is not UTF-8 ({error.reason})", file=sys.stderr)
            except UsageError as error:
                print(f"error: {error}", file=sys.stderr)

    def _obey(self, line: str) -> None:
        command, _, words = line.partition(" ")
        if line and not line.startswith("/"):
            self._write(_encode(self.loaded, 0, line))
        elif command == "/help":
            print(HELP, file=sys.stderr)
        elif command == "/again":
            if self.prompt is None:
                raise UsageError("nothing is written yet: type how a text starts")
            self._change("seed", str(self.args.seed + 1))
            self._write(self.prompt)
        elif command in ("", "/more"):
            self._write(self._continued(words))
        elif command[1:] in CHANGEABLE:
            self._change(command[1:], words)
        else:
            nearest = difflib.get_close_matches(command[1:], COMMANDS, 1)
            advice = f"did you mean /{nearest[0]}? " if nearest else ""
            raise UsageError(f"there is no {command}: {advice}/help shows the commands")

    def _write(self, prompt: Prompt) -> None:
        self.prompt, self.new = prompt, []
        try:
            _stream(self.loaded, prompt, self.args, self.new)
        except KeyboardInterrupt:
            print()

    def _continued(self, words: str) -> Prompt:
        """What was written, and then `words`, as the beginning of the next part. Raises UsageError if it has ended."""
        if self.prompt is None:
            return _encode(self.loaded, 0, words)
        completion, end_of_text = np.array(self.new, np.int32), self.loaded.tokenizer.end_of_text
        text = _decode(self.loaded, self.prompt, completion)
        number, shown = self.prompt.number + 1, printable(text).rstrip(UNFINISHED)
        if words:
            text = text.rstrip(UNFINISHED)
            text += words if text[-1:].isspace() else f" {words}"
            return Prompt(number, text, self.loaded.tokenizer.encode(text).tolist(), shown)
        if end_of_text in self.new:
            raise UsageError("the text has ended: start another, or /more WORDS, or /again")
        return Prompt(number, text, [*self.prompt.ids, *up_to_end(completion, end_of_text).tolist()], shown)

    def _change(self, name: str, value: str) -> None:
        """Changes a flag, or shows it if the value is empty. Raises UsageError."""
        if not value:
            print(f"/{name} {getattr(self.args, name)}", file=sys.stderr)
            return
        try:
            args = _sampling_parser().parse_args([f"--{name}={value}"], Namespace(**vars(self.args)))
        except UsageError as error:
            current = getattr(self.args, name)
            raise UsageError(f"/{name} cannot be {value!r}: give a number such as {current}") from error
        _check(args)
        self.args = args


def _generate(
    loaded: LoadedModel, prompts: Sequence[Prompt], args: Namespace, chunk: int | None
) -> Iterator[np.ndarray]:
    params, key = sampling_params(args), jax.random.fold_in(jax.random.PRNGKey(args.seed), 0)
    ids, indices = [prompt.ids for prompt in prompts], [prompt.number for prompt in prompts]
    config, weights, tokenizer = loaded
    return generate(config, weights, ids, params, key, args.tokens, tokenizer.end_of_text, chunk, indices)


def _decode(loaded: LoadedModel, prompt: Prompt, row: np.ndarray) -> str:
    """The text of the prompt and the completion; the end-of-text before an empty prompt is none. Raises RunError."""
    end_of_text = loaded.tokenizer.end_of_text
    try:
        ids = [*prompt.ids, *up_to_end(row, end_of_text)]
    except FloatingPointError as error:
        advice = "choose an earlier --step of the run, or another --model"
        raise RunError(f"{error}, because its weights are damaged or diverged: {advice}") from error
    return loaded.tokenizer.decode(ids[ids[0] == end_of_text :])


if __name__ == "__main__":
    quiet_libraries()
    run(main)
