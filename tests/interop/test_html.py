"""The page that writes, as a file. `tests/browser/test_writing_page.py` opens it."""

from dataclasses import replace

import numpy as np

from jaxlm.config import PROMPTS, Config, ModelConfig, SampleConfig
from jaxlm.core.parameters import parameter_table, tree_of
from jaxlm.data.tokenizer import load_tokenizer
from jaxlm.interop.html import packed_vocabulary, read_mark, write_page

MODEL = ModelConfig(vocab_size=300, context=16, layers=2, heads=2, width=64, mlp_width=96, kv_heads=1, tied=False)
META = {"source": {"text": "/home/john/tales.txt", "sha256": "ef"}, "tokens": {}}


def write(file, model, dtype, prompts=PROMPTS):
    params = tree_of(model, lambda parameter: np.ones(parameter.shape, np.float32))
    config = Config(model=model, sample=SampleConfig(prompts=prompts))
    write_page(file, config, 3, META, params, load_tokenizer(model.vocab_size), dtype)
    return file.read_bytes()


def test_the_file_is_the_weights_in_base64_and_half_a_megabyte(tmp_path):
    model = replace(MODEL, vocab_size=50_257, width=32)
    weights = sum(2 * parameter.size for parameter in parameter_table(model))
    assert len(write(tmp_path / "page.html", model, "f16")) <= weights * 4 / 3 + 500_000


def test_the_page_has_the_name_of_the_text_and_no_path(tmp_path):
    page = write(tmp_path / "page.html", MODEL, "f16")
    assert b"trained on tales.txt." in page
    for word in (b"/home", b"john", str(tmp_path).encode()):
        assert word not in page


def test_the_page_shows_a_beginning_also_if_the_run_takes_its_own_from_the_text(tmp_path):
    for prompts, shown in ((("Dear <Ann>",), "Dear &lt;Ann&gt;"), ((), PROMPTS[0])):
        page = write(tmp_path / "page.html", MODEL, "f16", prompts)
        assert f'placeholder="{shown}"'.encode() in page


def test_the_mark_is_that_of_the_rest(tmp_path):
    file = tmp_path / "page.html"
    first = write(file, MODEL, "q8_0")
    assert read_mark(file).sound
    assert write(file, MODEL, "q8_0") == first
    for content in (first.replace(b"trained", b"tamed", 1), first + b"\n", first[: len(first) // 2], b""):
        file.write_bytes(content)
        assert not read_mark(file).sound
    assert not read_mark(tmp_path / "none.html").sound


def test_the_packed_vocabulary_rebuilds_every_token():
    tokenizer = load_tokenizer(2000)
    packed = packed_vocabulary(tokenizer)
    tokens = [packed[i : i + 1] for i in range(256)]
    for left, right in np.frombuffer(packed[256:], "<u2").reshape(-1, 2):
        tokens.append(tokens[left] + tokens[right])
    assert tuple(tokens) == tokenizer.vocabulary[:-1]
