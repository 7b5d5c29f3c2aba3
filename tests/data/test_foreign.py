"""Token files of other programs are named, and no file of GPT-2's ids is taken for one."""

import gzip
import io
import subprocess
import zipfile

import numpy as np
import pytest

from jaxlm.data.corpus import open_corpus
from jaxlm.data.token_files import open_tokens
from jaxlm.data.tokenizer import load_tokenizer
from jaxlm.errors import UsageError

IDS = load_tokenizer().encode("".join(chunk.text for chunk in open_corpus("novels").train())[:40_000])
WIDE = np.random.default_rng(0).integers(0, 128_000, 1000)


def header(magic, version, count):
    return np.array([magic, version, count, *[0] * 253], "<i4").tobytes()


def packed(array):
    np.save(stream := io.BytesIO(), array)
    return stream.getvalue()


def zipped(content):
    with zipfile.ZipFile(stream := io.BytesIO(), "w") as archive:
        archive.writestr("train.bin", content)
    return stream.getvalue()


def put(directory, content):
    for name in ("train.bin", "val.bin"):
        (directory / name).write_bytes(content)


def refusal(directory, vocab_size=50257):
    with pytest.raises(UsageError) as refused:
        open_tokens(directory, vocab_size, 8)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        *((IDS.astype(dtype).tobytes(), "32-bit or 64-bit numbers") for dtype in ("<u4", "<i4", ">u4", "<i8", ">i8")),
        (header(20240801, 7, 1000) + WIDE.astype("<u4").tobytes(), "Llama 3"),
        (header(1234, 1, 1000) + IDS.astype("<u2").tobytes(), "header of 256 numbers"),
        (packed(IDS), "NumPy array"),
        (gzip.compress(IDS.tobytes()), "gzip data"),
        (zipped(IDS.tobytes()), "zip archive"),
        (b"It was the best of times.\r\n\t" * 100, "is text"),
        (b"It was the best of times. \n" * 3 + b"An odd number of bytes, which is 129 in all: ..", "is text"),
        ("漢字".encode() * 700, "is text"),
        (bytes(1000), "nothing but zeros"),
        (np.frombuffer(b"to be or not to be" * 20, np.uint8).astype("<u2").tobytes(), "single characters or bytes"),
    ],
)
def test_files_of_other_programs_are_named(tmp_path, content, kind):
    put(tmp_path, content)
    message = refusal(tmp_path)
    assert kind in message
    assert "python -m jaxlm.prepare --corpus TEXT --out FOLDER" in message
    assert (tmp_path / "train.bin").read_bytes() == content


def test_only_one_of_the_files_may_be_foreign(tmp_path):
    put(tmp_path, IDS.astype("<u2").tobytes())
    (tmp_path / "val.bin").write_bytes(IDS.astype("<u4").tobytes())
    assert "val.bin is a file of 32-bit" in refusal(tmp_path)


def test_the_header_of_llm_c_is_removed_by_the_command(tmp_path):
    tmp_path /= "it's"
    tmp_path.mkdir()
    put(tmp_path, header(20240520, 1, len(IDS)) + IDS.astype("<u2").tobytes())
    command = refusal(tmp_path).split("remove it with ")[1]
    subprocess.run(command.replace("FOLDER/", ""), shell=True, check=True, cwd=tmp_path.parent)
    put(tmp_path, (tmp_path.parent / "train.bin").read_bytes())
    assert open_tokens(tmp_path, 50257, 8).train.tolist() == IDS.tolist()


def test_ids_of_nanogpts_characters_are_known_by_the_file_beside_them(tmp_path):
    put(tmp_path, IDS.astype("<u2").tobytes())
    (tmp_path / "meta.pkl").mkdir()  # it cannot be opened
    assert "meta.pkl is beside" in refusal(tmp_path)


def test_the_file_beside_the_target_of_a_link_counts(tmp_path):
    (nano := tmp_path / "nano").mkdir()
    (links := tmp_path / "links").mkdir()
    put(nano, IDS.astype("<u2").tobytes())
    (nano / "meta.pkl").touch()
    for name in ("train.bin", "val.bin"):
        (links / name).symlink_to(nano / name)
    assert "meta.pkl is beside" in refusal(links)


@pytest.mark.parametrize("vocab_size", [300, 512, 4096])
def test_characters_are_known_in_a_small_vocabulary_from_text_without_merges(tmp_path, vocab_size):
    text = "नमस्ते दुनिया,\nयह हिंदी है। " * 20
    put(tmp_path, load_tokenizer(vocab_size).encode(text).astype("<u2").tobytes())
    assert open_tokens(tmp_path, vocab_size, 8).train.max() < 256
    characters = sorted(set(text))
    put(tmp_path, np.array([characters.index(c) for c in text], "<u2").tobytes())
    assert "single characters" in refusal(tmp_path, vocab_size)


def test_files_of_gpt2s_ids_are_opened(tmp_path):
    """Also with a small id in every second place, with the magics of short formats, and of a smaller vocabulary."""
    small = np.repeat(IDS, 2)
    small[1::2] = np.arange(len(IDS)) % 4
    starts = [b"PK\3\4", b"\x1f\x8b\x08\x00", b"BZh9"]
    contents = [IDS, small, *(np.concatenate([np.frombuffer(start, "<u2"), IDS]) for start in starts)]
    for ids in contents:
        put(tmp_path, ids.astype("<u2").tobytes())
        assert open_tokens(tmp_path, 50257, 8).train.tolist() == ids.tolist()
    put(tmp_path, bytes(range(200)) * 2)
    assert "outside the vocabulary" in refusal(tmp_path, 300)
    put(tmp_path, (np.arange(1000) % 200).astype("<u2").tobytes())
    assert len(open_tokens(tmp_path, 300, 8).train) == 1000


def test_short_text_of_gpt2_is_opened(tmp_path):
    put(tmp_path, load_tokenizer().encode("Ha! ha! ha! ha! ha!").astype("<u2").tobytes())
    assert open_tokens(tmp_path, 50257, 8).meta is None


@pytest.mark.parametrize(("largest", "advice"), [(400, "--config.model.vocab_size=50257"), (60_000, "jaxlm.prepare")])
def test_the_advice_for_an_id_outside_the_vocabulary_fits(tmp_path, largest, advice):
    put(tmp_path, np.array([*range(100, 300), largest], "<u2").tobytes())
    assert advice in refusal(tmp_path, 300)
