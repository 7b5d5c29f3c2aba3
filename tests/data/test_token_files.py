"""Token files: what is refused, and that batches hold every token as often as they should."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.data.token_files import open_tokens, train_batch_stream, val_batches
from jaxlm.data.tokenizer import load_tokenizer
from jaxlm.errors import UsageError


def windows_of(ids, context):
    return sorted(tuple(ids[i : i + context + 1].tolist()) for i in range(0, len(ids) - context, context))


def take_rows(stream, batches):
    return [tuple(row.tolist()) for _ in range(batches) for row in next(stream)]


@pytest.mark.parametrize(
    ("tokens", "context", "batch_size"), [(1001, 10, 7), (1009, 10, 100), (35, 4, 32), (12, 11, 3), (30, 4, 1)]
)
def test_every_window_once_an_epoch_and_each_epoch_in_its_own_order(tokens, context, batch_size):
    ids = np.random.default_rng(0).permutation(tokens).astype(np.uint16)
    whole = windows_of(ids, context)
    stream = train_batch_stream(ids, context, batch_size, seed=3)
    rows = take_rows(stream, -(-3 * len(whole) // batch_size))
    epochs = [rows[i * len(whole) : (i + 1) * len(whole)] for i in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [whole] * 3
    if len(whole) > 5:
        assert len({tuple(epoch) for epoch in epochs} | {tuple(whole)}) == 4


def test_batches_are_int32_of_full_shape():
    batch = next(train_batch_stream(np.arange(100, dtype=np.uint16), 8, 5, seed=0))
    assert (batch.shape, batch.dtype) == ((5, 9), np.int32)


def test_starting_late_is_skipping():
    ids = np.arange(501, dtype=np.uint16)
    rows = take_rows(train_batch_stream(ids, 10, 7, seed=1), 30)
    for start in (1, 8, 29):
        assert take_rows(train_batch_stream(ids, 10, 7, seed=1, start_batch=start), 30 - start) == rows[7 * start :]
    assert rows != take_rows(train_batch_stream(ids, 10, 7, seed=2), 30)


def test_a_seed_gives_the_same_batches_on_every_version_of_grain():
    stream = train_batch_stream(np.arange(2001, dtype=np.uint16), 20, 6, seed=7)
    batches = b"".join(next(stream).tobytes() for _ in range(31))  # into the second epoch
    assert hashlib.sha256(batches).hexdigest() == "88b32089cd5bf96a6d120c00e3705cc2be909308448ec70349113383b9c061bf"


def test_another_process_gets_the_same_batches():
    program = """
import hashlib, numpy as np
from jaxlm.data.token_files import train_batch_stream
stream = train_batch_stream(np.arange(2001, dtype=np.uint16), 20, 6, seed=7, start_batch=11)
print(hashlib.sha256(b"".join(next(stream).tobytes() for _ in range(20))).hexdigest())
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    stream = train_batch_stream(np.arange(2001, dtype=np.uint16), 20, 6, seed=7)
    batches = [next(stream).tobytes() for _ in range(31)]
    assert ran.stdout.split()[-1] == hashlib.sha256(b"".join(batches[11:])).hexdigest()


@given(tokens=st.integers(2, 200), context=st.integers(1, 40), batch_size=st.integers(1, 9))
def test_every_validation_token_but_the_first_is_predicted_once(tokens, context, batch_size):
    ids = np.arange(tokens, dtype=np.uint16) + 1
    predicted = []
    for inputs, targets in val_batches(ids, context, batch_size):
        assert inputs.shape == targets.shape == (batch_size, context)
        assert inputs.dtype == targets.dtype == np.int32
        kept = targets >= 0
        assert (inputs[kept] + 1 == targets[kept]).all()
        assert (targets[~kept] == -1).all() and (inputs[~kept] == 0).all()
        predicted += targets[kept].tolist()
    assert predicted == ids[1:].tolist()


@given(windows=st.integers(1, 60), limit=st.integers(1, 80), batch_size=st.integers(1, 9))
def test_limited_validation_is_spread_evenly(windows, limit, batch_size):
    ids = np.arange(windows * 5 + 1, dtype=np.uint16)
    batches = list(val_batches(ids, 5, batch_size, limit))
    starts = [
        int(row[0]) // 5 for inputs, targets in batches for row, t in zip(inputs, targets, strict=True) if t[0] > 0
    ]
    assert len(starts) == min(limit, windows)
    assert starts[0] == 0 and starts == sorted(set(starts))
    gaps = np.diff([*starts, windows])
    assert gaps.max() - gaps.min() <= 1


def write(directory, train, val, meta=None):
    directory.mkdir(exist_ok=True)
    np.asarray(train, "<u2").tofile(directory / "train.bin")
    np.asarray(val, "<u2").tofile(directory / "val.bin")
    if meta:
        hashes = {
            name: hashlib.sha256((directory / f"{name}.bin").read_bytes()).hexdigest() for name in ("train", "val")
        }
        files = {
            name: {"tokens": len(ids), "bytes": 1, "documents": 1, "sha256": hashes[name]}
            for name, ids in (("train", train), ("val", val))
        }
        whole = {"tokenizer": "gpt2", "vocab_size": 300, "source": "a", "source_sha256": "", "validation_fraction": 0.1}
        (directory / "meta.json").write_text(json.dumps({**whole, **files, **meta}))


def test_token_files_of_nanogpt_work(tmp_path):
    """Its data/*/prepare.py writes documents of uint16 ids, each with end-of-text after it, and no meta.json."""
    tokens = load_tokenizer()
    documents = ["Once upon a time…", "The end.", "Ärger 漢字"]
    ids = [i for document in documents for i in [*tokens.encode(document).tolist(), 50256]]
    write(tmp_path, ids * 10, ids)
    files = open_tokens(tmp_path, 50257, 8)
    assert files.meta is None
    assert (files.train.tolist(), files.val.tolist()) == (ids * 10, ids)
    first = len(tokens.decode(ids[:1]).encode())
    assert files.val_bytes == sum(len(document.encode()) for document in documents) - first
    with pytest.raises(ValueError, match="read-only"):
        files.val[0] = 1


def test_bits_per_byte_of_uniform_guessing(tmp_path):
    write(tmp_path, [299, *b"ab" * 20], [299, *b"ab" * 20])  # 40 tokens of one byte after the first
    files = open_tokens(tmp_path, 300, 8)
    assert files.bits_per_byte(float(np.log(256))) == pytest.approx(8)


GOOD = list(range(250))


@pytest.mark.parametrize(
    ("train", "val", "meta", "says"),
    [
        (GOOD, [*GOOD, 300], {}, "val.bin has token id 300, above the vocabulary of 300"),
        ([*GOOD, 65535], GOOD, {}, "train.bin has token id 65535"),
        (GOOD[:10], GOOD, {}, "train.bin holds 10 tokens, less than one window of 11"),
        (GOOD, GOOD[:10], {}, "val.bin holds 10 tokens"),
        ([], GOOD, {}, "train.bin is 0 bytes"),
        (GOOD, GOOD, {"tokenizer": "llama"}, "tokenizer llama of 300"),
        (GOOD, GOOD, {"vocab_size": 512}, "tokenizer gpt2 of 512 tokens, not gpt2 of 300"),
        (GOOD, GOOD, {"train": {"tokens": 9, "bytes": 1, "documents": 1, "sha256": ""}}, "not those that meta.json"),
        (GOOD, GOOD, {"val": {}}, "meta.json is damaged"),
        (GOOD, GOOD, {"extra": 1}, "meta.json is damaged"),
        (GOOD, GOOD, {"vocab_size": "300"}, "meta.json is damaged"),
        (GOOD, GOOD, {"source": ["a"]}, "meta.json is damaged"),
        (GOOD, GOOD, {"validation_fraction": "0.1"}, "meta.json is damaged"),
        (GOOD, GOOD, {"val": {"tokens": 250.0, "bytes": 1, "documents": 1, "sha256": ""}}, "meta.json is damaged"),
        (GOOD, GOOD, {"train": "train.bin"}, "meta.json is damaged"),
        (GOOD, [299] * 11, {}, "val.bin holds no text after its first token"),
        (GOOD, [1] + [299] * 10, None, "val.bin holds no text after its first token"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path, train, val, meta, says):
    write(tmp_path, train, val, meta)
    with pytest.raises(UsageError, match=says) as refused:
        open_tokens(tmp_path, 300, 10)
    assert "\n" not in str(refused.value)


def test_files_that_just_fit_are_opened(tmp_path):
    write(tmp_path, GOOD[:11], [*GOOD, 299], {"source": "b"})
    files = open_tokens(tmp_path, 300, 10)
    assert files.meta is not None and files.meta.source == "b"
    assert files.sha256[0] == hashlib.sha256((tmp_path / "train.bin").read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
def test_a_flipped_bit_of_what_was_prepared_is_found(tmp_path, name):
    write(tmp_path, GOOD, GOOD, {"source": "b"})
    held = bytearray((tmp_path / name).read_bytes())
    held[200] ^= 1
    (tmp_path / name).write_bytes(held)
    with pytest.raises(UsageError, match=r"not those that meta.json tells of"):
        open_tokens(tmp_path, 300, 10)


def test_missing_odd_and_broken_files_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"train.bin is missing: make it with python -m jaxlm.prepare"):
        open_tokens(tmp_path / "nowhere", 300, 10)
    with pytest.raises(UsageError, match=r"train.bin is missing"):
        open_tokens(tmp_path / ("x" * 300), 300, 10)
    write(tmp_path, GOOD, GOOD)
    (tmp_path / "train.bin").write_bytes(b"x" * 501)
    with pytest.raises(UsageError, match="501 bytes"):
        open_tokens(tmp_path, 300, 10)
    write(tmp_path, GOOD, GOOD)
    for damaged in (b"[", b"[" * 100_000, b"[]", b"null", b'{"train": {}}', b"\xff", b"9" * 5000):
        (tmp_path / "meta.json").write_bytes(damaged)
        with pytest.raises(UsageError, match="damaged"):
            open_tokens(tmp_path, 300, 10)
    (tmp_path / "val.bin").unlink()
    with pytest.raises(UsageError, match=r"val.bin is missing"):
        open_tokens(tmp_path, 300, 10)
