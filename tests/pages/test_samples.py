"""The samples that a page has room for."""

import json

from jaxlm.pages.samples import MOST_CHARACTERS, read_samples
from tests.pages.made_run import HOSTILE, write_rows


def test_each_prompt_keeps_its_first_and_last_sample_within_the_room(tmp_path):
    path = tmp_path / "samples.jsonl"
    rows = [
        {"step": step, "prompt": prompt, "text": f"{prompt} {step} {'é' * 200}"}
        for step in range(1, 501)
        for prompt in "ab"
    ]
    write_rows(path, rows)
    for room in (100_000, 20_000):
        prompts, damaged = read_samples(path, room)
        assert 0.5 * room < len(json.dumps(prompts)) < 1.1 * room
        assert ([each["prompt"] for each in prompts], damaged) == (["a", "b"], 0)
        for each in prompts:
            steps = [entry["step"] for entry in each["entries"]]
            assert (each["count"], steps[0], steps[-1]) == (500, 1, 500)
            assert steps == sorted(set(steps))
            assert all(entry["text"].startswith(f"{each['prompt']} {entry['step']} ") for entry in each["entries"])


def test_long_texts_are_cut_and_control_characters_become_spaces(tmp_path):
    path = tmp_path / "samples.jsonl"
    write_rows(
        path, [{"step": 1, "prompt": text, "text": text} for text in HOSTILE] + [{"step": 1, "prompt": "no text"}]
    )
    prompts, damaged = read_samples(path)
    texts = [each["entries"][0]["text"] for each in prompts]
    assert damaged == 1
    assert texts[0] == HOSTILE[0]
    assert texts[1] == "a b [31m red "
    assert texts[3] == "x" * MOST_CHARACTERS + " … (7,000 characters more)"
