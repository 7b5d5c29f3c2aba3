"""What a resumed run says about settings that have changed."""

import json
import math
import re
from dataclasses import replace

import pytest

from jaxlm.config import from_config_dict, to_dict
from jaxlm.run.resume import describe_changes


def config_of(**settings):
    optimizer = {"learning_rate": 3e-4, "warmup_steps": 100} | settings.pop("optimizer", {})
    return from_config_dict({"max_steps": 1000, "optimizer": optimizer} | settings)


def changes(before, after, step=300):
    return describe_changes(json.loads(json.dumps(to_dict(before))), after, step)


def cosine(peak, step, max_steps, warmup=100, lowest=0.1):
    return peak * (lowest + (1 - lowest) * (1 + math.cos(math.pi * (step - warmup) / (max_steps - warmup))) / 2)


def test_each_changed_setting_has_a_line():
    after = config_of(optimizer={"b2": 0.98, "clip_norm": 0.5}, model={"precision": "bf16"})
    assert changes(config_of(), after) == [
        "model.precision is 'bf16', was 'auto' up to step 300",
        "optimizer.b2 is 0.98, was 0.95 up to step 300",
        "optimizer.clip_norm is 0.5, was 1.0 up to step 300",
    ]
    assert changes(after, after) == []


def test_a_long_value_is_cut():
    (line,) = changes(config_of(), config_of(sample={"prompts": ["word " * 100]}))
    assert len(line) < 300


def test_a_path_written_in_another_way_is_no_change():
    assert changes(config_of(data={"dir": "a/b"}), config_of(data={"dir": "./a/b/"})) == []


@pytest.mark.parametrize(("max_steps", "verb"), [(2000, "rises"), (500, "falls")])
def test_the_learning_rate_that_max_steps_changes_is_given_before_and_after(max_steps, verb):
    setting, rate = changes(config_of(), config_of(max_steps=max_steps))
    assert setting == f"max_steps is {max_steps}, was 1000 up to step 300"
    before, after = (cosine(3e-4, 300, steps) for steps in (1000, max_steps))
    assert rate == f"so the learning rate {verb} from {before:.1e} to {after:.1e}"


def test_a_finished_run_that_is_prolonged_says_so_and_offers_a_second_schedule():
    _, rate, offer = changes(config_of(), config_of(max_steps=1500), step=1000)
    assert rate == f"so the learning rate rises from 3.0e-05 to {cosine(3e-4, 1000, 1500):.1e}"
    flag = re.search(r"--config\.optimizer\.(lr_restart_step)=(\d+) ", offer)
    again = config_of(max_steps=1500, optimizer={flag[1]: int(flag[2])})
    lines = changes(config_of(), again, step=1000)
    assert lines[-1] == f"so the learning rate falls from 3.0e-05 to {3e-4 * 0.6 / 101:.1e}"  # of the warm-up
    assert not any("lr_restart_step=" in line for line in lines)
    assert "lr_restart_step=1500" in changes(again, replace(again, max_steps=2000), step=1500)[-1]


def test_muon_has_both_rates():
    muon = {"name": "muon", "muon_learning_rate": 6e-3}
    lines = changes(config_of(optimizer=muon), config_of(optimizer=muon, max_steps=2000))
    before, after = (cosine(6e-3, 300, steps) for steps in (1000, 2000))
    assert lines[1].startswith("so the learning rate rises from ")
    assert lines[2] == f"so the muon learning rate rises from {before:.1e} to {after:.1e}"


def test_a_lower_peak_is_a_lower_rate():
    lines = changes(config_of(), config_of(optimizer={"learning_rate": 1e-4}))
    before, after = (cosine(peak, 300, 1000) for peak in (3e-4, 1e-4))
    assert lines[1:] == [f"so the learning rate falls from {before:.1e} to {after:.1e}"]
