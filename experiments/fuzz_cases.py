"""Random and damaged inputs for experiments/fuzz.py: each kind makes a call that must succeed or be refused."""

import contextlib
import gzip
import io
import json
import lzma
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import jax
import numpy as np
from pyarrow import parquet, table

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

from jaxlm import sample
from jaxlm.cli import read_config
from jaxlm.config import Config, ModelConfig, differences, from_config_dict, to_dict
from jaxlm.core.decoder import init_params
from jaxlm.core.parameters import Params
from jaxlm.core.sampling import SamplingParams
from jaxlm.data.token_files import META, TRAIN, VAL, TokenFiles, open_tokens
from jaxlm.data.tokenizer import END_OF_TEXT, encode_prompts, load_tokenizer
from jaxlm.errors import RunError
from jaxlm.interop.huggingface import read_params, read_sizes, read_tokenizer, write_model
from jaxlm.main import open_data
from jaxlm.prepare import prepare
from jaxlm.run.load import LoadedModel
from jaxlm.run.workdir import check_workdir
from jaxlm.storage.jsonl import keep_up_to

jax.config.update("jax_platforms", "cpu")
SIZES = {"vocab_size": 300, "context": 8}
TEXT, VALIDATION = "text.txt", 0.1
WORDS = ("the", " king", "Once upon a time", "a.txt", "novels", "tiny.py", "7", "é", " 漢字", "👩‍👧", "\n")
ODD_TEXTS = (
    *("", " ", "\n", "\r\n", "\t", "\x1b[31m", "\ufeff", "\u2028", "\u202e", "\x85", "\udcff", "\udc80"),
    *(END_OF_TEXT, "<|endof", "'", '"', "\\", "%s", "{0}", "${HOME}", "..", "~", "*", "**/*", "[", ":", ",", "="),
    *("None", "nan", "-inf", "1e999", "-0", "0x" + "f" * 5000, "9" * 5000, "(" * 500, "x" * 300, "x y" * 5000),
)
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, 0, -1, 1, 300, 0.5, -0.0, 1e308, math.nan, math.inf, 2**31, 10**40, 10**400, "", "300", "a\nb"),
    *("x" * 100_000, "\ud800", [], {}, [[]], ["a", 1], {"tokens": 1}, {"text": "a"}, [{"": None}] * 3),
)
ODD_BYTES = (b"\0", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\n", b'"', b"\\ud800", b"9" * 5000, b"[" * 100_000)
CONFIG = b"from jaxlm.config import default_config\n\ndef get_config():\n    return default_config()\n"
PACKERS: dict[str, Any] = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstd.compress}
Call = Callable[[], object]


def some_text(rng: Random, oddness: float = 0.3, most: int = 6) -> str:
    """As a command may get it from a shell, which passes any bytes but NUL."""
    return "".join(rng.choice(ODD_TEXTS if rng.random() < oddness else WORDS) for _ in range(rng.randint(0, most)))


def damaged(rng: Random, content: bytes) -> bytes:
    """The content with some bytes changed, inserted, deleted, doubled or reversed, or cut off."""
    for _ in range(rng.randint(1, 3)):
        start = rng.randint(0, len(content))
        end = start + rng.choice((1, 2, 9, 1000))
        middle = content[start:end]
        middle = rng.choice((b"", rng.randbytes(len(middle)), rng.choice(ODD_BYTES), middle * 2, middle[::-1]))
        content = content[:start] + middle + (b"" if rng.random() < 0.1 else content[end:])
    return content


def mutated(rng: Random, value: Any) -> Any:
    """The JSON value with a part replaced, deleted, added or wrapped."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        without = {name: inner for name, inner in value.items() if name != key}
        more = {**value, some_text(rng): rng.choice(ODD_VALUES)}
        return rng.choices(({**value, key: mutated(rng, value[key])}, without, more), (6, 1, 1))[0]
    near = [value + 1, float(value), str(value), -value] if isinstance(value, int | float) else [[value], f"{value} "]
    return rng.choice([*near, rng.choice(ODD_VALUES)])


def some_json(rng: Random, value: Any) -> bytes:
    """The value as JSON; often mutated or damaged."""
    kind = rng.random()
    value = mutated(rng, value) if 0.3 < kind < 0.8 else value
    content = json.dumps(value, ensure_ascii=kind < 0.9).encode(errors="replace")
    return damaged(rng, content) if kind > 0.8 else content


def put(rng: Random, path: Path, content: bytes) -> None:
    """Writes a file; sometimes none, a directory or a dangling link."""
    if rng.random() > 0.03:
        path.write_bytes(content)
    elif rng.random() < 0.5:
        path.mkdir()
    elif rng.random() < 0.5:
        path.symlink_to("nowhere")


def flags(rng: Random) -> Call:
    Path("tiny.py").write_bytes(CONFIG if rng.random() < 0.9 else damaged(rng, CONFIG))
    words = [word for _ in range(rng.choice((1, 1, 2, 3))) for word in _flag(rng)]
    config, workdir = rng.choices(("tiny.py", some_text(rng)), (9, 1))[0], some_text(rng)
    words += rng.choice(([f"--config={config}"], ["--config", config], [f"--config={config}"] * 2))
    words += rng.choices(([], ["--workdir", workdir], [f"--workdir={workdir}"], [workdir]), (16, 2, 2, 1))[0]
    return partial(_take_flags, rng.choices((words, rng.sample(words, len(words) - 1)), (19, 1))[0])


def _flag(rng: Random) -> list[str]:
    """A setting on the command line; usually a valid name and value."""
    name, value = rng.choice(list(to_dict(Config()).items()))
    while isinstance(value, dict):
        inner, value = rng.choice(list(value.items()))
        name += f".{inner}"
    if isinstance(value, bool | int | float):
        value = rng.choice((value, value, value, 1, 2, 64, 0.5))
    elif isinstance(value, tuple):
        value = tuple(some_text(rng, 0.1) for _ in range(rng.randint(1, 3)))
    text = rng.choices((str(value), some_text(rng, 0.8, 3), repr(rng.choice(ODD_VALUES))), (12, 1, 1))[0]
    if rng.random() < 0.05:
        name = os.fsdecode(damaged(rng, name.encode()).replace(b"\0", b"")[:100])
    return rng.choices(([f"--config.{name}={text}"], [f"--config.{name}", text], [f"--config.{name}"]), (40, 10, 1))[0]


def _take_flags(words: list[str]) -> None:
    config, _ = read_config(words)
    settings = json.loads(json.dumps(to_dict(config)))
    assert from_config_dict(settings) == config and not differences(settings, config)


@cache
def prepared() -> dict[str, bytes]:
    """A text and its token files."""
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place), contextlib.redirect_stdout(io.StringIO()):
        Path(TEXT).write_text("the king saw the old dog go home. " * 40)
        prepare(TEXT, Path("out"), SIZES["vocab_size"], VALIDATION)
        return {name: Path(name).read_bytes() for name in (TEXT, f"out/{TRAIN}", f"out/{VAL}", f"out/{META}")}


def _put_prepared(rng: Random, files: dict[str, bytes]) -> Call:
    """Writes these files, some damaged. Returns a call that opens them."""
    Path("out").mkdir()
    for name, content in files.items():
        put(rng, Path(name), content)
    out = "out" if rng.random() < 0.95 else some_text(rng)
    data = {"corpus": rng.choice((TEXT, TEXT, some_text(rng))), "dir": out or ".", "val_fraction": VALIDATION}
    by_config = partial(_take_tokens, open_data, from_config_dict({"model": SIZES, "data": data}))
    by_path = partial(_take_tokens, open_tokens, Path(out), *SIZES.values())
    return rng.choice((by_config, by_path, partial(_take_corpus, TEXT, out, SIZES["vocab_size"], VALIDATION)))


def tokens(rng: Random) -> Call:
    files = dict(prepared())
    for name in rng.sample((TRAIN, VAL), rng.randint(0, 2)):
        largest = rng.choices((299, 65_535), (4, 1))[0]
        ids = [rng.randint(rng.choice((0, 0, largest)), largest) for _ in range(rng.choice((0, 8, 9, 40, 500)))]
        files[f"out/{name}"] = np.array(ids, "<u2").tobytes() + b"x" * (rng.random() < 0.1)
    if rng.random() < 0.5:
        del files[f"out/{META}"]
    return _put_prepared(rng, files)


def meta(rng: Random) -> Call:
    return _put_prepared(rng, {**prepared(), f"out/{META}": some_json(rng, json.loads(prepared()[f"out/{META}"]))})


def _take_tokens(opener: Callable[..., TokenFiles], *arguments: Any) -> None:
    files = opener(*arguments)
    assert max(files.train.max(), files.val.max()) < SIZES["vocab_size"] and files.text_bytes(files.val[1:]) > 0


def corpora(rng: Random) -> Call:
    names = [_write_corpus(rng, number) for number in range(rng.choice((1, 1, 1, 2)))]
    odd_source = rng.choice(("*", "*.txt", ".", some_text(rng), f"{names[0]},missing"))
    source = ",".join(names) if rng.random() < 0.85 else odd_source
    out = "out" if rng.random() < 0.95 else some_text(rng)
    vocab_size = rng.choices((257, 300, 1000, 256, 50_258), (8, 8, 8, 1, 1))[0]
    fraction = rng.choices((0.1, 0.5, 0.999, 1e-9, 0.0, 1.0, math.nan, -1.0), (20, 20, 2, 2, 1, 1, 1, 1))[0]
    if rng.random() < 0.2:
        _put_prepared(rng, prepared())
        source = TEXT if rng.random() < 0.8 else source
        vocab_size, fraction = rng.choice(((vocab_size, fraction), (SIZES["vocab_size"], VALIDATION)))
    return partial(_take_corpus, source, out, vocab_size, fraction)


def _write_corpus(rng: Random, number: int) -> str:
    kind = rng.choices((".txt", ".jsonl", ".parquet", ".csv", ""), (10, 10, 5, 1, 1))[0]
    pack = rng.choice(list(PACKERS)) if kind in (".txt", ".jsonl") else ""
    name = re.sub(r"[\0/,*\[\]?]", "", some_text(rng, 0.1, 2))[:50] + f"{number}{kind}{pack}"
    texts = [some_text(rng, 0.02, 20) for _ in range(rng.choice((1, 3, 5, 5, 30, 220)))]
    if kind == ".parquet":
        clean = [text.encode(errors="replace").decode() for text in texts]
        column = rng.choice((clean, clean, clean, [*clean, None], [len(text) for text in clean]))
        parquet.write_table(table({rng.choice(("text", "text", "text", "a\nb")): column}), packed := io.BytesIO())
        content = packed.getvalue()
    elif kind == ".jsonl":
        rows = [{"text": text, "more": [1]} for text in texts]
        rows[-1] = rows[-1] if rng.random() < 0.8 else mutated(rng, rows[-1])
        content = "\n".join(json.dumps(row) for row in rows).encode()
    else:
        encoding = rng.choices(("utf-8", "utf-8-sig", "utf-16", "latin-1"), (12, 2, 1, 1))[0]
        content = rng.choice((END_OF_TEXT, "\n", " ")).join(texts).encode(encoding, errors="replace")
    content = PACKERS[pack](damaged(rng, content) if rng.random() < 0.15 else content)
    Path(name).write_bytes(damaged(rng, content) if rng.random() < 0.15 else content)
    return name


def _take_corpus(source: str, directory: str, vocab_size: int, fraction: float) -> None:
    new = not os.path.exists(Path(directory, META))
    meta = prepare(source, Path(directory), vocab_size, fraction)
    files = open_tokens(Path(directory), vocab_size, 1)
    assert files.meta == meta
    if new:
        assert files.text_bytes(files.val) == meta.val.bytes > 0 < meta.train.bytes
        assert files.train[0] == files.val[0] == vocab_size - 1


def prompts(rng: Random) -> Call:
    texts = [some_text(rng, 0.2) for _ in range(rng.randint(1, 4))]
    return partial(_take_prompts, texts, rng.choice((257, 300, 1000)), rng.choice((1, 16, 128, 1024)))


def _take_prompts(texts: list[str], vocab_size: int, context: int) -> None:
    tokenizer = load_tokenizer(vocab_size)
    for prompt, ids in zip(texts, encode_prompts(tokenizer, texts, context), strict=True):
        assert 0 < len(ids) < context and tokenizer.decode(ids) == (prompt or END_OF_TEXT)


def arguments(rng: Random) -> Call:
    words = [f"--workdir={some_text(rng)}"] if rng.random() < 0.95 else []
    good = {"prompt": some_text(rng, 0.1), "model": "model", "temperature": "0.5", "top_p": "0.5", "platform": "cpu"}
    for _ in range(rng.randint(0, 3)):
        name = rng.choice((*good, "step", "tokens", "top_k", "seed", "prompts", "-"))
        value = good.get(name, "7") if rng.random() < 0.8 else some_text(rng, 0.8, 2)
        words += rng.choice(([f"--{name}={value}"], [f"--{name}={value}"], [f"--{name}", value]))
    return partial(take_sample, words)


def take_sample(words: list[str]) -> None:
    """Runs `jaxlm.sample` with a model that repeats its prompts."""
    model = ModelConfig()
    loaded = LoadedModel(model, {}, load_tokenizer(model.vocab_size))
    with mock.patch.object(sample, "load_run", lambda *_: (1, loaded)), mock.patch.object(sample, "generate", _repeat):
        sample.main(words)


def _repeat(
    _: object, __: object, ids: list[list[int]], sampling: SamplingParams, *___: object
) -> list[list[list[int]]]:
    assert np.isfinite(sampling.temperature) and sampling.temperature >= 0
    return [ids]


def zeros(model: ModelConfig) -> Params:
    """Parameters of the right shapes, without a compilation."""
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


@cache
def exported() -> dict[str, bytes]:
    """The files of an exported model."""
    config = Config(model=ModelConfig(**SIZES, layers=2, heads=2, width=8, mlp_width=8))
    with tempfile.TemporaryDirectory() as place:
        folder = write_model(Path(place, "model"), config, zeros(config.model), load_tokenizer(SIZES["vocab_size"]), "")
        return {path.name: path.read_bytes() for path in folder.iterdir()}


def models(rng: Random) -> Call:
    files = dict(exported())
    name = rng.choice(("config.json", "model.safetensors", "tokenizer.json", "model.safetensors.index.json"))
    index = {
        "metadata": {},
        "weight_map": {"model.norm.weight": rng.choice(("model.safetensors", "../x", "config.json"))},
    }
    content = json.loads(files[name]) if name in files and name.endswith(".json") else index
    files[name] = damaged(rng, files[name]) if name == "model.safetensors" else some_json(rng, content)
    Path("model").mkdir()
    for file, content in files.items():
        put(rng, Path("model", file), content)
    return partial(_take_model, Path("model" if rng.random() < 0.95 else some_text(rng)))


def _take_model(folder: Path) -> None:
    model = read_sizes(folder)
    tokenizer = read_tokenizer(folder, model.vocab_size)
    assert 0 <= tokenizer.end_of_text < model.vocab_size and tokenizer.encode("a").max() < SIZES["vocab_size"]
    assert jax.tree.map(np.shape, zeros(model)) == jax.tree.map(np.shape, read_params(folder, model))


def workdirs(rng: Random) -> Call:
    config = to_dict(Config(batch_size=rng.choice((32, 32, 32, 16))))
    put(rng, Path("config.json"), some_json(rng, config))
    row = rng.choice(({"step": 1, "loss": 2.5}, {"step": 1, "prompt": "a", "text": "ab"}))
    rows = [json.dumps(row | {"step": step}).encode() for step in range(rng.randint(0, 5))]
    put(rng, Path("metrics.jsonl"), b"\n".join([*rows, some_json(rng, row)]))
    workdir = Path(some_text(rng) if rng.random() < 0.05 else ".")
    return partial(check_workdir, workdir, Config()) if rng.random() < 0.5 else partial(_take_records, workdir)


def _take_records(workdir: Path) -> None:
    path = workdir / "metrics.jsonl"
    try:
        damaged = keep_up_to(path, 3)
    except OSError as error:  # as in `main`
        raise RunError(f"cannot write to {workdir} ({error.strerror})") from error
    assert bool(damaged) == os.path.exists(f"{path}.damaged")
    assert not os.path.exists(path) or all(json.loads(line)["step"] <= 3 for line in path.read_bytes().splitlines())


KINDS = {kind.__name__: kind for kind in (flags, tokens, meta, corpora, prompts, arguments, workdirs, models)}
