"""What a work directory holds before a session."""

import errno
import json
import os
from pathlib import Path

import pytest

from jaxlm.config import Config, to_dict
from jaxlm.errors import RunError, UsageError
from jaxlm.run.workdir import check_workdir, saved_steps
from tests.tiny_run import is_one_line, listing

ROWS = "".join(f'{{"step": {step}}}\n' for step in range(1, 8))


@pytest.fixture
def workdir(tmp_path):
    """That of a run with two checkpoints."""
    (tmp_path / "config.json").write_text(json.dumps(to_dict(Config())))
    for name in ("metrics.jsonl", "samples.jsonl"):
        (tmp_path / name).write_text(ROWS)
    for step in (3, 6):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    return tmp_path


def lose(workdir, how):
    for path in (workdir / "checkpoints").iterdir():
        path.rmdir()
    if how != "emptied":
        (workdir / "checkpoints").rmdir()
    if how == "unmounted":
        (workdir / "checkpoints").symlink_to("/no/such/disk")


def refusal(workdir):
    before = listing(workdir)
    with pytest.raises(UsageError) as caught:
        check_workdir(workdir, Config())
    assert is_one_line(caught.value)
    assert listing(workdir) == before
    return str(caught.value)


def test_steps_are_those_of_complete_checkpoints(workdir):
    for name in ("9.damaged", "12.orbax-checkpoint-tmp", "notes"):
        (workdir / "checkpoints" / name).mkdir()
    assert saved_steps(workdir) == [3, 6]
    assert saved_steps(workdir / "nowhere") == []


def test_steps_that_cannot_be_listed_are_no_lost_checkpoints(workdir, monkeypatch):
    def fail(path):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(Path, "iterdir", fail)
    with pytest.raises(RunError, match="check that the disk is still mounted") as caught:
        check_workdir(workdir, Config())
    assert is_one_line(caught.value)


def test_a_run_with_checkpoints_gives_its_settings(workdir):
    assert check_workdir(workdir, Config())["seed"] == 0
    (workdir / "checkpoints/6").rmdir()  # the newest: the run resumes from the one before
    check_workdir(workdir, Config(max_steps=101))
    assert check_workdir(workdir / "new", Config()) == {}


@pytest.mark.parametrize("how", ["deleted", "unmounted", "emptied"])
@pytest.mark.parametrize("kept", ["metrics.jsonl", "samples.jsonl"])
def test_records_without_their_checkpoints_are_refused_and_can_be_moved_away(workdir, how, kept):
    (workdir / ({"metrics.jsonl", "samples.jsonl"} - {kept}).pop()).unlink()
    lose(workdir, how)
    message = refusal(workdir)
    assert str(workdir / "checkpoints") in message
    assert "mount" in message
    moved = message.rpartition(" move ")[2].removesuffix(" away").split(", ")
    assert moved == [kept] + ["checkpoints"] * (how == "unmounted")
    for name in moved:
        (workdir / name).rename(workdir / f"{name}.old")
    check_workdir(workdir, Config())


def test_a_run_that_was_never_saved_starts_again(workdir):
    lose(workdir, "emptied")
    (workdir / "never_saved").touch()
    (workdir / "checkpoints/3.orbax-checkpoint-tmp-1").mkdir()
    check_workdir(workdir, Config())


@pytest.mark.parametrize("how", ["deleted", "unmounted", "emptied", "a file"])
def test_a_run_without_any_mark_was_saved(workdir, how):
    """One of an earlier version has no mark; a file is no checkpoint, whatever its name."""
    lose(workdir, "emptied" if how == "a file" else how)
    if how == "a file":
        (workdir / "checkpoints/5").write_text("")
    (workdir / "config.json").unlink()
    assert "metrics.jsonl" in refusal(workdir)


def test_a_run_that_was_never_saved_and_lost_its_folder_is_refused(workdir):
    lose(workdir, "deleted")
    (workdir / "never_saved").touch()
    assert "checkpoints is not there" in refusal(workdir)


@pytest.mark.parametrize("how", ["deleted", "unmounted", "emptied"])
def test_a_final_model_alone_is_not_replaced_by_another_run(workdir, how):
    lose(workdir, how)
    for name in ("metrics.jsonl", "samples.jsonl"):
        (workdir / name).unlink()
    (workdir / "final_model").mkdir()
    if how != "unmounted":
        check_workdir(workdir, Config())  # an empty folder, or a link to one, is no loss
    (workdir / "final_model/model.safetensors").touch()
    message = refusal(workdir)
    assert f"move {', '.join(['final_model'] + ['checkpoints'] * (how == 'unmounted'))} away" in message


def test_empty_records_are_no_loss(workdir):
    lose(workdir, "deleted")
    for name in ("metrics.jsonl", "samples.jsonl"):
        (workdir / name).write_text("")
    check_workdir(workdir, Config())


def test_fixed_settings_are_compared_and_others_may_change(workdir):
    with pytest.raises(UsageError, match=r"seed is 1, the saved run has 0; choose another --workdir"):
        check_workdir(workdir, Config(seed=1))
    with pytest.raises(UsageError, match="init_from is /model, the saved run has empty; choose"):
        check_workdir(workdir, Config(init_from="/model"))
    check_workdir(workdir, Config(save_interval=7))


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "\ud800"])
def test_a_path_that_cannot_exist_has_nothing(name):
    assert check_workdir(Path(name), Config()) == {}
