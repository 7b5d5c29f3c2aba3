"""The page that writes, in Chromium: its texts, its ids and its random tokens are those of jaxlm."""

import base64
import contextlib
import dataclasses
import io
import itertools
import json

import gguf
import jax
import numpy as np
import pytest

from experiments.interop import odd_texts
from jaxlm.config import Config, ModelConfig
from jaxlm.core.generate import generate, up_to_end
from jaxlm.core.model import prepare_decode_params
from jaxlm.core.parameters import tree_of
from jaxlm.core.sampling import SamplingParams
from jaxlm.data.tokenizer import load_tokenizer
from jaxlm.data.vocabulary import learn_tokenizer
from jaxlm.interop.html import pack, packed_vocabulary, page_source, write_page
from jaxlm.interop.huggingface import write_model
from jaxlm.sample import main as sample

pytestmark = pytest.mark.browser
CONTROL_ENTER = "\ue009\ue007"  # as WebDriver spells these keys
Q8_0 = gguf.GGMLQuantizationType.Q8_0

TINY = ModelConfig(
    vocab_size=300, context=24, layers=2, heads=4, width=24, mlp_width=20, rope_theta=50.0, norm_eps=0.03
)
QUICKSTART = {"vocab_size": 4096, "context": 128, "layers": 3, "heads": 2, "width": 128, "mlp_width": 384}
HOSTILE = "<img src=x onerror=document.title='ran'>\u202e&amp;{{model}}"


@pytest.fixture(scope="module")
def own():
    """A vocabulary learnt from texts in several scripts."""
    return learn_tokenizer(odd_texts()[:14] * 2, 300)


def random_params(model):
    """Parameters of float16's numbers, so large that each of them changes the logits."""
    rng = np.random.default_rng(0)
    return tree_of(model, lambda p: rng.normal(0, 0.4, p.shape).astype(np.float16).astype(np.float32))


def export(file, model, params, tokenizer, text="tales.txt"):
    meta = {"source": {"text": text, "sha256": "ef"}, "tokens": {}}
    write_page(file, Config(model=model), 3, meta, params, tokenizer, "f16")


def open_model(browser, file, width=1280):
    browser.open(file, width)
    browser.wait("return document.getElementById('write').disabled === false")


def write(browser, beginning, **settings):
    """What the page shows when it has written: the beginning and the text."""
    for name, value in {"beginning": beginning, "temperature": 0, "tokens": 64, **settings}.items():
        browser.run("document.getElementById(arguments[0]).value = arguments[1]", name, value)
    browser.find("#write").click()
    browser.wait("return document.getElementById('write').textContent === 'Write'")
    return browser.run("return document.getElementById('text').textContent")


def sampled(folder, beginning):
    """What `jaxlm.sample` writes, in float32."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        flags = ["--temperature", "0", "--tokens", "64", "--platform", "cpu", "--precision", "float32", "--json"]
        sample(["--model", str(folder), "--prompt", beginning, *flags])
    return json.loads(out.getvalue())["text"]


@pytest.mark.parametrize(
    ("sizes", "vocabulary"),
    [
        ({"kv_heads": 2, "qk_norm": True}, "own"),  # a short context: the window slides
        ({"heads": 3, "kv_heads": 1, "tied": False, "context": 96}, "gpt2"),
        (QUICKSTART, "gpt2"),
    ],
)
def test_greedy_texts_are_those_of_sample(browser, tmp_path, own, sizes, vocabulary):
    model = dataclasses.replace(TINY, **sizes)
    params = random_params(model)
    tokenizer = own if vocabulary == "own" else load_tokenizer(model.vocab_size)
    export(tmp_path / "page.html", model, params, tokenizer)
    write_model(tmp_path / "model", Config(model=model), params, tokenizer, "card")
    open_model(browser, tmp_path / "page.html")
    for beginning in ("Once upon a time", "日本語 é\n"):
        assert write(browser, beginning) == sampled(tmp_path / "model", beginning)


def test_a_beginning_longer_than_the_context_is_read_from_its_window(browser, tmp_path, own):
    """`jaxlm.sample` refuses it."""
    params = random_params(TINY)
    export(tmp_path / "page.html", TINY, params, own)
    open_model(browser, tmp_path / "page.html")
    beginning = odd_texts()[0]
    ids = own.encode(beginning).tolist()
    assert len(ids) > 2 * TINY.context
    weights = prepare_decode_params(TINY, params)
    (tokens,) = generate(TINY, weights, [ids], SamplingParams(0.0), jax.random.PRNGKey(0), 64, own.end_of_text)
    text = own.decode([*ids, *up_to_end(tokens[0], own.end_of_text)])
    assert write(browser, beginning) == text


def test_characters_of_several_tokens_are_whole(browser, tmp_path):
    """The model writes the bytes of a text, of which the last character is unfinished, and ends it."""
    model, tokenizer = dataclasses.replace(TINY, vocab_size=257, tied=False), load_tokenizer(257)
    text = "a\ufeffé日😀".encode() + b"\xf1"
    ids = [*(tokenizer.vocabulary.index(text[i : i + 1]) for i in range(len(text))), tokenizer.end_of_text]
    params = tree_of(model, lambda parameter: np.full(parameter.shape, parameter.kind == "norm_scale", np.float32))
    for i, (token, following) in enumerate(itertools.pairwise(ids)):
        params["embedding"][token, i] = params["head"][following, i] = 1
    export(tmp_path / "page.html", model, params, tokenizer)
    open_model(browser, tmp_path / "page.html")
    assert write(browser, "a") == text.decode(errors="replace")
    assert browser.find("#status").text.startswith(f"The text ends here: {len(text) - 1} tokens")


@pytest.fixture
def programs(browser, tmp_path):
    """A page with the worker's programs, whose functions a test calls."""
    names = ("tokenizer.js", "weights.js", "sampling.js")
    (tmp_path / "programs.html").write_text(f"<script>{''.join(map(page_source, names))}</script>")
    browser.open(tmp_path / "programs.html")
    return browser


def test_the_ids_are_those_of_the_tokenizer(programs, own):
    texts = [*odd_texts(), "a" * 3000, "- " * 999, "\u0130\ufeff\x85x"]
    encode = """const tokenizer = new Tokenizer(fromBase64(arguments[0]));
        return [tokenizer.endOfText, arguments[1].map(text => tokenizer.encode(text))]"""
    for tokenizer in (load_tokenizer(), load_tokenizer(300), own):
        packed = base64.b64encode(packed_vocabulary(tokenizer)).decode()
        end_of_text, ids = programs.run(encode, packed, texts)
        assert end_of_text == tokenizer.end_of_text
        for text, each in zip(texts, ids, strict=True):
            assert each == tokenizer.encode(text).tolist(), text[:40]
    surrogate = "return new Tokenizer(fromBase64(arguments[0])).encode('a\\ud800b')"
    assert programs.run(surrogate, packed) == own.encode("a?b").tolist()


def test_random_tokens_have_the_probabilities_of_the_model(programs):
    """For evenly spread random numbers, each token comes as often as its probability says."""
    logits = np.random.default_rng(0).normal(0, 2, 40).astype(np.float32)
    script = """const [logits, temperature, topK, count] = arguments, logits_V = Float32Array.from(logits);
        return Array.from({ length: count }, (_, i) => sample(logits_V, temperature, topK, () => (i + 0.5) / count))"""
    for temperature, top_k in ((1.0, 0), (0.5, 8), (2.0, 1), (1.0, 99)):
        tokens = programs.run(script, logits.tolist(), temperature, top_k, 2000)
        weights = np.exp(np.float64(logits) / temperature)
        weights[np.argsort(-logits)[top_k or len(logits) :]] = 0
        counts = np.bincount(tokens, minlength=len(logits))
        np.testing.assert_allclose(counts / 2000, weights / weights.sum(), rtol=0, atol=1.01 / 2000)


@pytest.mark.parametrize("dtype", ["f32", "q8_0"])
def test_other_dtypes_give_their_numbers(programs, dtype):
    numbers = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32) ** 3
    numbers[1, :32] = 0
    packed = base64.b64encode(pack(numbers, dtype)).decode()
    unpacked = programs.run("return Array.from(UNPACK[arguments[0]](fromBase64(arguments[1])))", dtype, packed)
    expected = numbers if dtype == "f32" else gguf.dequantize(gguf.quantize(numbers, Q8_0), Q8_0)
    np.testing.assert_allclose(unpacked, expected.ravel(), rtol=1e-6)


def test_every_float16_is_read(programs):
    bits = np.arange(65536, dtype=np.uint16)
    expected = bits.view(np.float16).astype(float)
    finite = np.isfinite(expected)
    read = programs.run("return Array.from(FLOAT16, x => Number.isFinite(x) ? x : String(x))")
    assert [x for x, good in zip(read, finite, strict=True) if good] == expected[finite].tolist()
    names = {"inf": "Infinity", "-inf": "-Infinity", "nan": "NaN"}
    assert [x for x, good in zip(read, finite, strict=True) if not good] == [names[str(x)] for x in expected[~finite]]


def test_names_and_texts_are_shown_as_they_are(browser, tmp_path):
    page = tmp_path / f"{HOSTILE}.html"
    export(page, TINY, random_params(TINY), load_tokenizer(300), text=HOSTILE)
    open_model(browser, page, width=360)
    assert browser.find("h1").get_property("textContent") == HOSTILE
    assert f"trained on {HOSTILE}." in browser.find("h1 + p").get_property("textContent")
    assert write(browser, HOSTILE, tokens=1).startswith(HOSTILE)
    assert browser.run("return [document.title.includes(arguments[0]), document.images.length]", HOSTILE) == [True, 0]
    assert browser.run("return document.documentElement.scrollWidth") <= 360


def test_stop_ends_a_text_and_write_further_continues_it(browser, tmp_path):
    export(tmp_path / "page.html", TINY, random_params(TINY), load_tokenizer(300))
    open_model(browser, tmp_path / "page.html")
    for name, value in {"beginning": "Once", "temperature": 0, "tokens": 99_999}.items():
        browser.run("document.getElementById(arguments[0]).value = arguments[1]", name, value)
    browser.find("#beginning").send_keys(CONTROL_ENTER)
    browser.wait("return document.getElementById('written').textContent.length > 9")
    assert browser.find("#write").text == "Stop"
    browser.find("#write").click()
    browser.wait("return document.getElementById('write').textContent === 'Write'")
    assert browser.find("#status").text.startswith("Stopped: ")
    text = browser.run("return document.getElementById('text').textContent")
    browser.run("document.getElementById('tokens').value = 5")
    browser.find("#further").click()
    browser.wait("return document.getElementById('status').textContent.startsWith('Written: 5 tokens')")
    assert browser.run("return document.getElementById('begun').textContent") == text


def test_paper_is_light(browser, tmp_path):
    export(tmp_path / "page.html", TINY, random_params(TINY), load_tokenizer(300))
    dark, colours = {"name": "prefers-color-scheme", "value": "dark"}, {}
    browser.open(tmp_path / "page.html")
    for media in ("screen", "print"):
        browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": [dark]})
        colours[media] = browser.run("return getComputedStyle(document.body).color")
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert colours == {"screen": "rgb(233, 231, 226)", "print": "rgb(29, 28, 26)"}


def test_what_is_wrong_is_said(browser, tmp_path):
    params = random_params(TINY)
    params["norm"][0] = np.nan
    export(tmp_path / "page.html", TINY, params, load_tokenizer(300))
    open_model(browser, tmp_path / "page.html")
    write(browser, "Once")
    assert browser.find("#state").text == "The model's weights are damaged: its numbers are not finite."
    page = (tmp_path / "page.html").read_bytes()
    (tmp_path / "half.html").write_bytes(page[: len(page) - 9000])
    browser.open(tmp_path / "half.html")
    browser.wait("return document.getElementById('state').textContent !== 'Loading'")
    assert browser.find("#state").text == "This file is incomplete: copy or download it again."
    assert not browser.find("#write").is_enabled()
