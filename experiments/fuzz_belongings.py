"""Inputs that belong to a person, for experiments/fuzz.py: odd names, odd encodings, other programs' files."""

import contextlib
import io
import json
import os
import sys
from functools import cache, partial
from pathlib import Path
from random import Random
from unittest import mock

import numpy as np

from experiments.fuzz_cases import SIZES, TEXT, VALIDATION, Call, damaged, some_text, take_sample, zeros
from jaxlm import export, prepare
from jaxlm.config import Config, ModelConfig, from_config_dict
from jaxlm.data.token_files import TRAIN, VAL, open_tokens
from jaxlm.data.tokenizer import GPT2_VOCAB_SIZE
from jaxlm.main import open_data
from jaxlm.run.load import Checkpoint

NAME_PARTS = (
    "a",
    "book",
    "[1]",
    "[ab]",
    "*",
    "?",
    ",",
    " ",
    "~",
    "-",
    "{a,b}",
    "\n",
    "\\",
    "'",
    "é",
    "日",
    "\udcff",
    "%s",
    "#",
)
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be", "latin-1")
HEADERS = (20_240_520, 20_240_801)  # of llm.c's and modded-nanogpt's token files
NUMBERS = (
    "0",
    "-0",
    "1",
    "1e-46",
    "1e-30",
    "3e38",
    "1e39",
    "1e999",
    "inf",
    "-inf",
    "nan",
    "1_0",
    "\uff19",
    "",
    "9" * 400,
)
MARK, BLANKS = "\ufeff", 600_000


def names(rng: Random) -> Call:
    """Files with odd names, given to `jaxlm.prepare` by their names or by patterns."""
    files = {}
    for number in range(rng.randint(1, 3)):
        name = "".join(rng.choices(NAME_PARTS, k=rng.randint(1, 4))) + ".txt"
        if name not in files:
            files[name] = 900 * 3**number  # so that the total tells how often each was read
            Path(name).write_text(("the king saw it.\n" * files[name])[: files[name] - 1] + ".")
    chosen = rng.sample(list(files), rng.randint(1, len(files)))
    words = [rng.choice((name, f"./{name}", os.path.abspath(name))) for name in chosen]
    words += [rng.choice(("*.txt", "book*", chosen[0], "~/a.txt", "missing.txt"))] * (rng.random() < 0.3)
    return partial(_take_names, files, chosen, words, rng.random() < 0.5)


def _take_names(files: dict[str, int], chosen: list[str], words: list[str], as_setting: bool) -> None:
    """Each chosen file is read, and none twice."""
    if as_setting:
        data = {"corpus": ",".join(words), "val_fraction": VALIDATION}
        meta = open_data(from_config_dict({"model": SIZES, "data": data})).meta
    else:
        prepare.main(
            [f"--vocab_size={SIZES['vocab_size']}", f"--val_fraction={VALIDATION}", "--out=out", "--corpus", *words]
        )
        meta = open_tokens(Path("out"), *SIZES.values()).meta
    total = meta.train.bytes + meta.val.bytes
    times_read = {name: total // size % 3 for name, size in files.items()}
    assert set(times_read.values()) <= {0, 1} and all(times_read[name] for name in chosen), times_read
    assert total == sum(files[name] * times for name, times in times_read.items())


def encodings(rng: Random) -> Call:
    """A text in some encoding, with or without a mark, perhaps with NULs or a flood of blanks."""
    text = some_text(rng, 0, 60) + "the old king saw the dog. " * rng.choice((5, 40))
    if rng.random() < 0.2:
        text = "".join(c + "\0" * rng.choice((0, 1, 3)) for c in text)
    if rng.random() < 0.05:
        text += " " * BLANKS + "x"
    encoding, mark = rng.choices(ENCODINGS, (8, 3, *[1] * 7))[0], MARK * (rng.random() < 0.3)
    content = (mark + text).encode(encoding, errors="replace")
    if rng.random() < 0.3:
        name, content = "text.jsonl", json.dumps({"text": text}, ensure_ascii=False).encode(encoding, errors="replace")
    else:
        name = TEXT
    Path(name).write_bytes(content)
    return partial(_take_text, name, content)


def _take_text(name: str, content: bytes) -> None:
    """An accepted text is what was written, in UTF-8 or Windows-1252, without many NULs."""
    meta = prepare.prepare(name, Path("out"), SIZES["vocab_size"], VALIDATION)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:  # some of its bytes may have been UTF-8 by chance
        assert name == TEXT and meta.train.bytes + meta.val.bytes <= len(content.decode("cp1252").encode())
        return
    text = json.loads(text)["text"] if name.endswith(".jsonl") else text
    assert text.count("\0") < 0.25 * len(text)
    assert meta.train.bytes + meta.val.bytes == len(text.rstrip("\r\n").encode())


def foreign_tokens(rng: Random) -> Call:
    """Token files of other programs: of 4-byte ids, with a header, with a vocabulary of characters beside them."""
    ids = np.array([rng.randint(0, 65 if rng.random() < 0.3 else 50_256) for _ in range(rng.choice((60, 600, 3000)))])
    kind = rng.choice(("uint16", "uint16", "uint32", "int64", "header", "npy", "float32"))
    content = io.BytesIO()
    if kind == "npy":
        np.save(content, ids.astype("uint16"))
    elif kind == "header":
        content.write(np.array([rng.choice(HEADERS), 1, len(ids), *[0] * 253], "<i4").tobytes())
        content.write(ids.astype("<u2").tobytes())
    else:
        content.write(ids.astype(np.dtype(kind).newbyteorder("<")).tobytes())
    out = Path("out")
    out.mkdir()
    for name in (TRAIN, VAL):
        (out / name).write_bytes(content.getvalue())
    beside = rng.choice((None, None, "meta.pkl", "meta.json"))
    if beside:
        (out / beside).write_bytes(rng.randbytes(30))
    return partial(_take_foreign_tokens, kind, beside)


def _take_foreign_tokens(kind: str, beside: str | None) -> None:
    """Only 2-byte ids without anything else are taken for GPT-2's tokens."""
    settings = {"model": {"vocab_size": GPT2_VOCAB_SIZE, "context": 8}, "data": {"dir": "out"}}
    open_data(from_config_dict(settings))
    assert (kind, beside) == ("uint16", None)


def stdin(rng: Random) -> Call:
    """Prompts on stdin, with the line ends, marks and control codes of other systems."""
    lines = [some_text(rng, rng.choice((0, 0.3)), 4).replace("\n", " ") for _ in range(rng.randint(0, 20))]
    lines = [line.replace("\r", " ").encode(errors="replace").decode() for line in lines]
    if lines and rng.random() < 0.3:
        lines[rng.randrange(len(lines))] = rng.choice(("\0", "a\0b", "x" * 100_000, " " * BLANKS + "x"))
    end, mark = rng.choice(("\n", "\r\n")), MARK * (rng.random() < 0.3)
    content = (mark + end.join(lines) + end * rng.choice((0, bool(lines)))).encode()
    Path("stdin").write_bytes(damaged(rng, content) if rng.random() < 0.1 else content)
    return partial(_take_stdin, Path("stdin"))


def _take_stdin(path: Path) -> None:
    """Each line is answered in order, without its line end and the mark of the first; a refused one may be left out."""
    lines = path.read_bytes().removeprefix(MARK.encode()).removesuffix(b"\n").split(b"\n")
    expected = [line.removesuffix(b"\r").decode(errors="replace") for line in lines] if path.stat().st_size else []
    try:
        with path.open(encoding="utf-8") as file, mock.patch.object(sys, "stdin", file):
            take_sample(["--workdir=run", "--stdin", "--json"])
    finally:
        sys.stdout.flush()
        sys.stdout.buffer.seek(0)
        answered = [json.loads(line)["prompt"] for line in sys.stdout.buffer.read().decode().splitlines()]
        remaining = iter(expected)
        assert all(prompt in remaining for prompt in answered), answered
    assert answered == expected, answered


def sampling(rng: Random) -> Call:
    """Sampling flags with huge, tiny and odd numbers."""
    names, words = ("temperature", "top_p", "top_k", "tokens", "seed"), []
    for name in rng.sample(names, rng.randint(1, 3)):
        usual = {"temperature": "0.8", "top_p": "0.9"}.get(name, "7")
        words.append(f"--{name}={rng.choice((usual, usual, str(rng.randint(-2, 2**33)), *rng.sample(NUMBERS, 2)))}")
    return partial(take_sample, ["--workdir=run", "--prompt=a", *words])


@cache
def _restored() -> Checkpoint:
    config = Config(model=ModelConfig(**SIZES, layers=1, heads=2, width=8, mlp_width=8))
    fingerprint = {"tokenizer": "gpt2", "train_sha256": "", "val_sha256": ""}
    return Checkpoint(7, config, fingerprint, zeros(config.model))


def exports(rng: Random) -> Call:
    """Exports to places where a person's files are, or have the names of ours."""
    out = Path(rng.choice(("out", "deep/out", "[out]", "out.gguf", "ütf 8", some_text(rng, 0.1, 2))))
    mine = (
        "x.gguf",
        ".git",
        "thesis.txt",
        "model.safetensors",
        "config.json",
        "model-f16.gguf",
        "model.safetensors.tmp",
    )
    files = [out / name for name in rng.sample(mine, rng.randint(0, 3))] if rng.random() < 0.8 else []
    files += [Path(f"{out}.tmp", "mine")] * (rng.random() < 0.5)
    files += [out] * (rng.random() < 0.2)
    for path in files:
        with contextlib.suppress(OSError, ValueError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"mine: {path.name}")
    words = ["--workdir=run", f"--out={out}", f"--format={rng.choice(('hf', 'hf', 'gguf'))}"]
    words += ["--overwrite"] * (rng.random() < 0.6)
    earlier = rng.random() < 0.3
    return partial(_take_export, words, earlier)


def _take_export(words: list[str], earlier: bool) -> None:
    """A person's files stay, with or without an earlier export, whatever is said of the request."""
    with mock.patch("jaxlm.run.load.restore", lambda *_: _restored()):
        mine = {path: path.read_bytes() for path in Path("..").rglob("*") if path.is_file()}
        try:
            export.main(words)
            if earlier:
                export.main([*words, "--overwrite"])
        finally:
            lost = [str(path) for path, content in mine.items() if not path.is_file() or path.read_bytes() != content]
            assert not lost, f"lost: {lost}"


KINDS = {kind.__name__: kind for kind in (names, encodings, foreign_tokens, stdin, sampling, exports)}
