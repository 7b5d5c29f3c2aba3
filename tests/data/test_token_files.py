"""Token files: what is refused, and that batches contain every token equally often."""

import hashlib
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.data.token_files import bits_per_byte, open_tokens, train_batch_stream, val_batches
from jaxlm.data.tokenizer import load_tokenizer
from jaxlm.errors import UsageError


def windows_of(ids, context):
    return sorted(tuple(ids[i : i + context + 1].tolist()) for i in range(0, len(ids) - context, context))


def take_rows(stream, batches):
    return [tuple(row.tolist()) for _ in range(batches) for row in next(stream)]


@pytest.mark.parametrize(
    ("tokens", "context", "batch_size"), [(1001, 10, 7), (1009, 10, 100), (35, 4, 32), (12, 11, 3), (30, 4, 1)]
)
def test_each_epoch_has_every_window_once_in_a_new_order(tokens, context, batch_size):
    ids = np.random.default_rng(0).permutation(tokens).astype(np.uint16)
    windows = windows_of(ids, context)
    stream = train_batch_stream(ids, context, batch_size, seed=3)
    rows = take_rows(stream, -(-3 * len(windows) // batch_size))
    epochs = [rows[i * len(windows) : (i + 1) * len(windows)] for i in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [windows] * 3
    if len(windows) > 5:
        assert len({tuple(epoch) for epoch in epochs} | {tuple(windows)}) == 4


def test_batches_have_a_fixed_shape_and_dtype():
    batch = next(train_batch_stream(np.arange(100, dtype=np.uint16), 8, 5, seed=0))
    assert (batch.shape, batch.dtype) == ((5, 9), np.int32)


def test_start_batch_skips_batches():
    ids = np.arange(501, dtype=np.uint16)
    rows = take_rows(train_batch_stream(ids, 10, 7, seed=1), 30)
    for start in (1, 8, 29):
        assert take_rows(train_batch_stream(ids, 10, 7, seed=1, start_batch=start), 30 - start) == rows[7 * start :]
    assert rows != take_rows(train_batch_stream(ids, 10, 7, seed=2), 30)


def test_a_process_reads_only_its_rows():
    """The rows of all processes are the batch, and no other window is read."""

    class Ids:
        def __init__(self):
            self.read = set()

        def __len__(self):
            return len(ids)

        def __getitem__(self, index):
            self.read.add(index.start)
            return ids[index]

    ids = np.arange(501, dtype=np.uint16)
    whole = [next(batches) for batches in [train_batch_stream(ids, 10, 6, seed=1)] for _ in range(3)]
    parts = []
    for rows in (slice(0, 2), slice(2, 6)):
        stream = train_batch_stream(own := Ids(), 10, 6, seed=1, rows=rows)
        parts.append([next(stream) for _ in range(3)])
        read = set(own.read)
        ahead = [next(stream) for _ in range(8)]  # more than are prefetched
        assert read <= {int(row[0]) for batch in parts[-1] + ahead for row in batch}
    for batch, *pieces in zip(whole, *parts, strict=True):
        assert (np.concatenate(pieces) == batch).all()


def test_a_seed_gives_the_same_batches_in_every_process_and_version_of_grain():
    stream = train_batch_stream(np.arange(2001, dtype=np.uint16), 20, 6, seed=7)
    batches = b"".join(next(stream).tobytes() for _ in range(31))  # into the second epoch
    assert hashlib.sha256(batches).hexdigest() == "88b32089cd5bf96a6d120c00e3705cc2be909308448ec70349113383b9c061bf"


@given(tokens=st.integers(2, 200), context=st.integers(1, 40), batch_size=st.integers(1, 9))
def test_every_validation_token_but_the_first_is_a_target_once(tokens, context, batch_size):
    ids = np.arange(tokens, dtype=np.uint16) + 1
    predicted = []
    for inputs, targets in val_batches(ids, context, batch_size):
        assert inputs.shape == targets.shape == (batch_size, context)
        assert inputs.dtype == targets.dtype == np.int32
        valid = targets >= 0
        assert (inputs[valid] + 1 == targets[valid]).all()
        assert (targets[~valid] == -1).all() and (inputs[~valid] == 0).all()
        predicted += targets[valid].tolist()
    assert predicted == ids[1:].tolist()


@given(windows=st.integers(1, 60), limit=st.integers(1, 80), batch_size=st.integers(1, 9))
def test_limited_validation_is_evenly_spaced(windows, limit, batch_size):
    ids = np.arange(windows * 5 + 1, dtype=np.uint16)
    batches = list(val_batches(ids, 5, batch_size, limit))
    starts = [
        int(row[0]) // 5 for inputs, targets in batches for row, t in zip(inputs, targets, strict=True) if t[0] > 0
    ]
    assert len(starts) == min(limit, windows)
    assert starts[0] == 0 and starts == sorted(set(starts))
    gaps = np.diff([*starts, windows])
    assert gaps.max() - gaps.min() <= 1


def test_the_last_training_tokens_that_fill_no_window_are_never_targets():
    stream = train_batch_stream(np.arange(107, dtype=np.uint16), 10, 10, seed=0)
    targets = {int(i) for row in take_rows(stream, 5) for i in row[1:]}
    assert targets == set(range(1, 101))


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
        defaults = {
            "tokenizer": "gpt2",
            "vocab_size": 300,
            "source": "a",
            "source_sha256": "",
            "validation_fraction": 0.1,
        }
        (directory / "meta.json").write_text(json.dumps({**defaults, **files, **meta}))


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
    assert files.text_bytes(files.val[1:]) == sum(len(document.encode()) for document in documents) - first
    with pytest.raises(ValueError, match="read-only"):
        files.val[0] = 1


def test_bits_per_byte_of_uniform_guessing(tmp_path):
    write(tmp_path, [299, *b"ab" * 20], [299, *b"ab" * 20])  # 40 tokens of one byte after the first
    files = open_tokens(tmp_path, 300, 8)
    assert bits_per_byte(float(np.log(256)), 40, files.text_bytes(files.val[1:])) == pytest.approx(8)
    assert files.text_bytes(np.array([[97, -1], [299, 98]])) == 2
    assert 0 < bits_per_byte(1.0, 4, 0) < np.inf  # four end-of-text tokens


GOOD = list(range(250))


@pytest.mark.parametrize(
    ("train", "val", "meta", "message"),
    [
        (GOOD, [*GOOD, 300], {}, "val.bin has token id 300, outside the vocabulary of 300"),
        ([*GOOD, 65535], GOOD, {}, "train.bin has token id 65535"),
        (GOOD[:10], GOOD, {}, "train.bin holds 10 tokens, fewer than a sequence of 11"),
        (GOOD, GOOD[:10], {}, "val.bin holds 10 tokens"),
        ([], GOOD, {}, "train.bin is 0 bytes"),
        (GOOD, GOOD, {"tokenizer": "llama"}, "tokenizer llama of 300"),
        (GOOD, GOOD, {"vocab_size": 512}, "tokenizer gpt2 of 512 tokens, not gpt2 of 300"),
        (GOOD, GOOD, {"train": {"tokens": 9, "bytes": 1, "documents": 1, "sha256": ""}}, "do not match meta.json"),
        (GOOD, GOOD, {"val": {}}, "meta.json is not as"),
        (GOOD, GOOD, {"extra": 1}, "meta.json is not as"),
        (GOOD, GOOD, {"vocab_size": "300"}, "meta.json is not as"),
        (GOOD, GOOD, {"source": ["a"]}, "meta.json is not as"),
        (GOOD, GOOD, {"validation_fraction": "0.1"}, "meta.json is not as"),
        (GOOD, GOOD, {"val": {"tokens": 250.0, "bytes": 1, "documents": 1, "sha256": ""}}, "meta.json is not as"),
        (GOOD, GOOD, {"train": "train.bin"}, "meta.json is not as"),
        (GOOD, [299] * 11, {}, "val.bin holds no text after its first token"),
        (GOOD, [1] + [299] * 10, None, "val.bin holds no text after its first token"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path, train, val, meta, message):
    write(tmp_path, train, val, meta)
    with pytest.raises(UsageError, match=message) as refused:
        open_tokens(tmp_path, 300, 10)
    assert "\n" not in str(refused.value)


def test_the_smallest_files_that_fit_are_opened(tmp_path):
    write(tmp_path, GOOD[:11], [*GOOD, 299], {"source": "b"})
    files = open_tokens(tmp_path, 300, 10)
    assert files.meta is not None and files.meta.source == "b"
    assert files.sha256[0] == hashlib.sha256((tmp_path / "train.bin").read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
def test_a_flipped_bit_is_detected(tmp_path, name):
    write(tmp_path, GOOD, GOOD, {"source": "b"})
    content = bytearray((tmp_path / name).read_bytes())
    content[200] ^= 1
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=r"do not match meta.json"):
        open_tokens(tmp_path, 300, 10)


def test_missing_odd_sized_and_damaged_files_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"train.bin is missing: prepare its text with python -m jaxlm.prepare"):
        open_tokens(tmp_path / "nowhere", 300, 10)
    with pytest.raises(UsageError, match=r"train.bin is missing"):
        open_tokens(tmp_path / ("x" * 300), 300, 10)
    write(tmp_path, GOOD, GOOD)
    (tmp_path / "train.bin").write_bytes(b"\1" * 501)
    with pytest.raises(UsageError, match="501 bytes"):
        open_tokens(tmp_path, 300, 10)
    write(tmp_path, GOOD, GOOD)
    for damaged in (b"[", b"[" * 100_000, b"[]", b"null", b'{"train": {}}', b"\xff", b"9" * 5000):
        (tmp_path / "meta.json").write_bytes(damaged)
        with pytest.raises(UsageError, match="not as jaxlm writes it: move it away"):
            open_tokens(tmp_path, 300, 10)
    (tmp_path / "val.bin").unlink()
    with pytest.raises(UsageError, match=r"val.bin is missing"):
        open_tokens(tmp_path, 300, 10)


@pytest.mark.parametrize("change", [lambda text: "[", lambda text: text.replace('"sha256": "', '"sha256": "0')])
def test_the_advice_for_a_wrong_meta_json_keeps_the_tokens(tmp_path, change):
    """They may be the only ones that a checkpoint accepts."""
    write(tmp_path, GOOD, GOOD, {"source": "b"})
    file = tmp_path / "meta.json"
    file.write_text(change(file.read_text()))
    with pytest.raises(UsageError) as caught:
        open_tokens(tmp_path, 300, 10)
    assert f"--config.data.dir={tmp_path}" in str(caught.value)
    assert "move" in str(caught.value)
    assert "delete" not in str(caught.value)
    file.rename(tmp_path / "moved")
    assert open_tokens(tmp_path, 300, 10).meta is None
