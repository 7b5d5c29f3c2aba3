"""What the page knows of a run."""

import json
import shutil
from itertools import product

import numpy as np
import pytest

from jaxlm.config import Config, OptimizerConfig
from jaxlm.core.optimizer import make_schedule
from jaxlm.errors import UsageError
from jaxlm.pages import run
from jaxlm.pages.plan import planned_lr
from jaxlm.pages.run import read_run
from tests.pages.made_run import metrics, session, with_settings, write_hostile, write_rows, write_run


def test_the_planned_learning_rate_is_that_of_the_optimizer():
    steps = np.arange(1, 201)
    for schedule, (warmup, fraction, ratio), restart in product(
        ("cosine", "linear"), ((0, 1.0, 0.1), (10, 0.55, 0.0), (1, 0.0, 0.2)), (0, 120)
    ):
        config = OptimizerConfig(
            warmup_steps=warmup,
            lr_schedule=schedule,
            lr_decay_fraction=fraction,
            min_lr_ratio=ratio,
            lr_restart_step=restart,
            lr_restart_ratio=0.4,
        )
        expected = config.learning_rate * make_schedule(config, 200)(steps - 1)
        np.testing.assert_allclose(planned_lr(config, 200, steps.astype(float)), expected, rtol=1e-4, atol=1e-9)


def test_points_hold_what_the_rows_hold(tmp_path):
    shown = read_run(write_run(tmp_path / "mine"))
    rows = metrics(40)
    loss, val_loss = shown["metrics"]["loss"], shown["metrics"]["val_loss"]
    for key in ("step", "tokens", "seconds"):
        assert loss[key] == [row[key] for row in rows]
    np.testing.assert_allclose(loss["value"], [row["loss"] for row in rows], rtol=1e-8)
    assert val_loss["step"] == [10, 20, 30, 40]
    assert (shown["state"], shown["step"], shown["max_steps"], shown["seconds_left"]) == ("finished", 40, 40, None)
    assert (shown["plan"]["step_seconds"], shown["plan"]["total_seconds"]) == (2.5, 120.0)


def test_pauses_are_the_seconds_between_steps(tmp_path):
    shown = read_run(write_run(tmp_path))
    assert shown["pauses"]["step"] == [11, 21, 31]
    assert shown["pauses"]["length"] == [5, 5, 5]
    assert (shown["pauses"]["total"], shown["pauses"]["count"]) == (15, 3)
    write_rows(tmp_path / "metrics.jsonl", [row | {"seconds": row["seconds"] + 30} for row in metrics(40)])
    pauses = read_run(tmp_path)["pauses"]
    assert (pauses["step"][0], pauses["length"][0]) == (1, 30)  # the compilation


def test_the_best_checkpoint_is_named(tmp_path):
    write_run(tmp_path)
    for folder in ("checkpoints/30", "checkpoints/40", "best/checkpoints/20"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "file").write_bytes(bytes(7))
    losses = {row["step"]: row["val_loss"] for row in metrics(40) if "val_loss" in row}
    for each, (name, step) in zip(
        read_run(tmp_path)["checkpoints"],
        (("step 30", 30), ("step 40", 40), ("step 20, the best", 20)),
        strict=True,
    ):
        assert (each["name"], each["bytes"]) == (name, 7)
        assert each["val_loss"] == pytest.approx(losses[step])


def test_a_checkpoint_may_be_deleted_while_it_is_listed(tmp_path, monkeypatch):
    write_run(tmp_path)
    monkeypatch.setattr(run, "saved_steps", lambda workdir: [30])
    assert read_run(tmp_path)["checkpoints"] == []


def test_the_time_left_is_at_the_pace_of_the_last_rows(tmp_path):
    shown = read_run(write_run(tmp_path, steps=201, max_steps=1001))
    assert shown["seconds_left"] == pytest.approx(800 * 2.5)
    assert shown["state"] == "stopped"


def test_restarts_are_marked_where_a_session_resumed(tmp_path):
    write_run(tmp_path)
    write_rows(tmp_path / "sessions.jsonl", [session(step) for step in (0, 12, 30)])
    assert read_run(tmp_path)["restarts"] == {
        "step": [12, 30],
        "tokens": [786432, 1966080],
        "seconds": [29, 70],
        "count": 2,
    }
    write_rows(tmp_path / "sessions.jsonl", [session(step % 41) for step in range(5000)])
    restarts = read_run(tmp_path)["restarts"]
    assert len(restarts["step"]) == 200 < restarts["count"] == 4878


def test_a_run_that_is_written_is_running(tmp_path):
    write_run(tmp_path, steps=20)
    (tmp_path / "lock").write_text(json.dumps({"pid": 1, "host": "another"}))
    assert read_run(tmp_path)["state"] == "running"


def test_the_sample_command_has_a_prompt_of_the_run(tmp_path):
    write_run(tmp_path / "set", prompts=("It was", "Once"))
    write_run(tmp_path / "own")
    with_settings(tmp_path / "own", sample={"prompts": []})  # its samples continue its own text
    write_run(tmp_path / "new", steps=1, prompts=())
    for name, prompt in (("set", "'It was'"), ("own", "Once"), ("new", "'Once upon a time'")):
        assert read_run(tmp_path / name)["sample_command"].endswith(f"{name} --prompt {prompt}")


def test_a_page_that_may_be_published_has_no_folders(tmp_path):
    write_run(tmp_path / "mine")
    data = {"corpus": "/home/me/secret/a.txt,b/c.txt", "dir": "/home/me/tokens"}
    with_settings(tmp_path / "mine", data=data, init_from="/home/me/model")
    settings = read_run(tmp_path / "mine")["settings"]
    assert (settings["data.corpus"], settings["data.dir"], settings["init_from"]) == ("a.txt,c.txt", "tokens", "model")
    assert settings["batch_size"] == str(Config().batch_size)


def test_what_is_missing_or_hostile_ends_no_report(tmp_path):
    shown = read_run(write_hostile(tmp_path / "hostile"))
    assert shown["metrics"]["loss"]["nonfinite"] == 4
    assert shown["metrics"]["loss"]["value"][20:24] == [None] * 4
    assert shown["notes"] == [
        "3 damaged lines are left out of metrics.jsonl",
        "1 damaged line is left out of samples.jsonl",
    ]
    one = read_run(write_run(tmp_path / "one", steps=1))
    assert (one["step"], one["metrics"]["loss"]["value"]) == (1, [10])
    (tmp_path / "one" / "config.json").write_text("{")
    (tmp_path / "one" / "sessions.jsonl").unlink()
    assert read_run(tmp_path / "one")["plan"] is None
    (tmp_path / "one" / "metrics.jsonl").unlink()
    assert read_run(tmp_path / "one")["metrics"] == {}
    shutil.rmtree(tmp_path / "one")
    with pytest.raises(UsageError, match="one holds no run"):
        read_run(tmp_path / "one")
