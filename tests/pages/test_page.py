"""The page as a file: its policy, what it holds, and its size."""

import base64
import hashlib
import json
from html.parser import HTMLParser
from pathlib import Path

import jaxlm.pages
from jaxlm.pages.page import render
from jaxlm.pages.run import read_run
from tests.pages.made_run import HOSTILE, metrics, write_hostile, write_rows, write_run

FOLDER = Path(jaxlm.pages.__file__).parent
UPLOT = {  # version 1.6.32, dist/uPlot.iife.min.js and dist/uPlot.min.css of the npm package
    "uplot.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
    "uplot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
}


class Page(HTMLParser):
    """The tags of a page with their attributes, and the text of its title, scripts and styles."""

    def __init__(self, page: bytes):
        super().__init__()
        self.tags, self.texts, self.inside = [], [], ""
        self.feed(page.decode("utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = tag
        self.texts.append((tag, ""))

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, text):
        if self.inside:
            self.texts[-1] = (self.inside, self.texts[-1][1] + text)

    def text(self, tag):
        """The text of the first element of a tag that is not JSON."""
        return next(text for each, text in self.texts if each == tag and not text.startswith("{"))

    @property
    def data(self):
        (data,) = [text for kind, text in self.texts if kind == "script" and text.startswith("{")]
        return json.loads(data)


def test_hostile_texts_come_back_and_open_no_tag(tmp_path):
    run = read_run(write_hostile(tmp_path / "a</title><script>b"))
    page = render([run], "today", None)
    assert page.isascii()
    parsed, plain = Page(page), Page(render([read_run(write_run(tmp_path / "b"))], "today", None))
    assert parsed.data["runs"][0] == json.loads(json.dumps(run))
    assert parsed.data["runs"][0]["samples"][0]["entries"][-1]["text"] == f"{HOSTILE[0]} 30"
    assert [tag for tag, _ in parsed.tags] == [tag for tag, _ in plain.tags]
    assert parsed.text("title") == "title> script>b - jaxlm"


def test_the_policy_allows_these_scripts_and_no_request(tmp_path):
    page = Page(render([read_run(write_run(tmp_path))], "today", 20.0))
    (policy,) = [each["content"] for tag, each in page.tags if each.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules.pop("default-src") == "'none'"
    for kind in ("script", "style"):
        hashed = base64.b64encode(hashlib.sha256(page.text(kind).encode()).digest()).decode()
        assert rules.pop(f"{kind}-src") == f"'sha256-{hashed}'"
    assert rules == {"img-src": "data:", "base-uri": "'none'", "form-action": "'none'"}
    assert not [each for _, each in page.tags if {"src", "srcset", "data"} & each.keys()]


def test_uplot_is_the_released_file():
    for name, sha256 in UPLOT.items():
        assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == sha256
    notice = (FOLDER.parents[1] / "NOTICE").read_text()
    assert "version 1.6.32 of uPlot" in notice and "Leon Sorokin" in notice
    assert all(path.read_bytes().isascii() for path in FOLDER.glob("*.[chj]*s*"))


def test_a_long_run_fits_in_two_megabytes_with_its_last_values_and_extremes(tmp_path):
    write_run(tmp_path, steps=1, max_steps=20_000)
    rows = metrics(20_000)
    rows[12_345]["loss"], rows[777]["grad_norm"] = 0.12345678, 98765.4321
    write_rows(tmp_path / "metrics.jsonl", rows)
    text = "word and other words in a sample of some length " * 6
    samples = [
        {"step": step, "prompt": f"{number}", "text": f"{number} {text}"}
        for step in range(10, 20_001, 10)
        for number in range(4)
    ]
    write_rows(tmp_path / "samples.jsonl", samples)
    page = render([read_run(tmp_path)], "today", None)
    assert len(page) < 1_600_000
    (run,) = Page(page).data["runs"]
    assert min(run["metrics"]["loss"]["value"]) == 0.12345678
    assert max(run["metrics"]["grad_norm"]["value"]) == 98765.4321
    assert run["metrics"]["tokens_per_second"]["step"][-1] == 20_000
    assert len(run["metrics"]["loss"]["step"]) < 2100
