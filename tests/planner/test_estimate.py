"""Estimates compared with numbers computed by hand and with a simulation of the run, step by step."""

import dataclasses

import pytest

from configs import gpt2_124m, gpt2_350m, m2_60m
from jaxlm.config import Config, ModelConfig, from_config_dict
from jaxlm.planner import estimate
from jaxlm.planner.estimate import Timings

PRESET = from_config_dict(m2_60m.get_config())
SMALL = dataclasses.replace(
    Config(),
    batch_size=4,
    microbatch_chunks=2,
    model=ModelConfig(vocab_size=300, context=16, layers=2, heads=2, width=16, mlp_width=24, precision="float32"),
)


def test_parameters_and_flops_of_the_preset_by_hand():
    by_part = estimate.parameters_by_part(PRESET.model)
    assert by_part == {"embedding": 25_731_584, "attention": 8_388_608, "feed-forward": 25_165_824, "norms": 8_704}
    assert sum(by_part.values()) == 59_294_720
    # 59,286,016 parameters in matrices; attention over 8 layers, 1024 positions, width 512
    assert estimate.flops_per_token(PRESET.model) == 6 * 59_286_016 + 25_165_824


def test_the_larger_presets_say_how_many_parameters_they_have():
    for preset, layers, width, mlp_width in ((gpt2_124m, 12, 768, 2048), (gpt2_350m, 24, 1024, 2688)):
        norms = layers * (2 * width + 2 * 64) + width
        by_hand = 50_257 * width + layers * (4 * width**2 + 3 * width * mlp_width) + norms
        assert sum(estimate.parameters_by_part(from_config_dict(preset.get_config()).model).values()) == by_hand
        assert f" {by_hand:,} parameters" in preset.__doc__


def test_an_untied_head_is_a_part_and_its_embedding_needs_no_flops():
    tied = SMALL.model
    untied = dataclasses.replace(tied, tied=False)
    assert estimate.parameters_by_part(untied) == estimate.parameters_by_part(tied) | {"head": 4800}
    assert estimate.flops_per_token(untied) == estimate.flops_per_token(tied)


def test_norms_of_queries_and_keys_are_counted_and_need_no_flops_of_matmuls():
    model = dataclasses.replace(SMALL.model, qk_norm=True)
    parts, plain = estimate.parameters_by_part(model), estimate.parameters_by_part(SMALL.model)
    assert parts == plain | {"norms": plain["norms"] + 2 * 2 * 8}
    assert estimate.flops_per_token(model) == estimate.flops_per_token(SMALL.model)


SECONDS = Timings(5.0, 0.75, 0.5, 4.0, 0.25, 0.125, 2.0, 1.5)
SCHEDULES = [(50, 100, 300, 1000, 5), (7, 5, 3, 40, 2), (10, 10, 10, 60, 3), (4, 6, 9, 9, 1), (50, 60, 70, 20, 5)]


def scheduled(generation, evaluation, save, last, keep):
    return dataclasses.replace(
        SMALL,
        generation_interval=generation,
        eval_interval=evaluation,
        save_interval=save,
        max_steps=last,
        max_checkpoints=keep,
        optimizer=dataclasses.replace(SMALL.optimizer, warmup_steps=0),
    )


def simulate(config, timings):
    """Goes through the run: the time and the checkpoints after each step, and which checkpoint is deleted when."""
    now, checkpoints, history, deleted = timings.start, [], [(timings.start, [])], []
    for step in range(1, config.max_steps + 1):
        last = step == config.max_steps
        now += timings.step
        if last:
            now += timings.last_evaluation
        elif step % config.eval_interval == 0:
            now += timings.evaluation
        if last or step % config.generation_interval == 0:
            now += timings.samples
        if last or step % config.save_interval == 0:
            now += timings.save
            checkpoints.append(step)
            if len(checkpoints) > config.max_checkpoints:
                deleted.append((checkpoints.pop(0), step))
        if last:
            now += timings.end
        history.append((now, list(checkpoints)))
    return history, deleted


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_schedule_agrees_with_a_simulation(schedule):
    config = scheduled(*schedule)
    history, deleted = simulate(config, SECONDS)
    assert list(estimate.deletions(config)) == deleted
    for step, (seconds, checkpoints) in enumerate(history):
        assert estimate.seconds_at(config, SECONDS, step) == pytest.approx(seconds)
        assert estimate.kept(config, step) == checkpoints
    for seconds in (0.0, 5.0, 6.0, 17.3, history[-1][0] - 0.1, history[-1][0] + 1e-6, 1e9):
        done = [step for step, (at, _) in enumerate(history) if at <= seconds]
        assert estimate.step_at(config, SECONDS, seconds) == max(done, default=0)


@pytest.mark.parametrize("keep_every", [3, 9, 27])
def test_milestones_are_kept_beyond_max_checkpoints(keep_every):
    config = dataclasses.replace(scheduled(7, 5, 3, 40, 2), keep_every=keep_every)
    history, deleted = simulate(dataclasses.replace(config, keep_every=0), SECONDS)
    gone = [(old, new) for old, new in deleted if old % keep_every]
    assert list(estimate.deletions(config)) == gone
    saved = {step for _, checkpoints in history for step in checkpoints}
    for step in range(config.max_steps + 1):
        left = {old for old in saved if old <= step} - {old for old, new in gone if new <= step}
        assert estimate.kept(config, step) == sorted(left)


def test_the_presets_schedule_has_its_five():
    assert estimate.kept(PRESET, 50_000) == [48_900, 49_200, 49_500, 49_800, 50_000]
    assert (PRESET.save_minutes, PRESET.keep_every) == (30, 0)


def test_a_save_waits_for_the_one_before():
    config = scheduled(1000, 1000, 2, 1000, 5)
    slow = dataclasses.replace(SECONDS, saving=10.0)
    extra = estimate.seconds_at(config, slow, 100) - estimate.seconds_at(config, SECONDS, 100)
    assert extra == pytest.approx(50 * (10.0 - 2 * 0.75) - 50 * (2.0 - 2 * 0.75))


@pytest.mark.parametrize(
    ("step", "unit", "rows"), [(0.05, "second", 8), (1.0, "minute", 9), (30.0, "hour", 9), (3000.0, "day", 12)]
)
def test_the_timeline_has_few_rows_and_ends_with_the_last_step(step, unit, rows):
    config = scheduled(50, 100, 300, 1000, 5)
    timeline_unit, passed = estimate.timeline(config, dataclasses.replace(SECONDS, step=step))
    assert timeline_unit == unit
    assert rows <= len(passed) <= estimate.MAX_ROWS + 1
    assert passed[-1][1] == 1000
    assert [step for _, step in passed] == sorted(step for _, step in passed)


def test_days_of_the_preset_at_26_seconds_a_step():
    steps_only = Timings(0.0, 26.18, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    assert estimate.step_at(PRESET, steps_only, 9 * 86400) == 9 * 86400 * 100 // 2618
    unit, passed = estimate.timeline(PRESET, steps_only)
    assert (unit, len(passed)) == ("day", 16)  # 50,000 x 26.18 s are 15.15 days


def test_a_step_is_done_at_its_second():
    for step in (1, 49_999, 50_000):
        seconds = estimate.seconds_at(PRESET, SECONDS, step)
        assert estimate.step_at(PRESET, SECONDS, seconds) == step
        assert estimate.step_at(PRESET, SECONDS, seconds - 0.01) == step - 1
