"""How processes find each other, agree and end together, without others; tests/run/test_processes.py has two."""

import collections
import os
import threading
import time
from pathlib import Path

import pytest

from jaxlm.device import distributed
from jaxlm.errors import CorruptCheckpointError, RunError, UsageError
from tests.tiny_run import is_one_line


class Service:
    """The key-value store of jax's service, in this process."""

    def __init__(self):
        self.values = {}

    def key_value_set(self, key, value, allow_overwrite=False):
        assert allow_overwrite or key not in self.values
        self.values[key] = value

    def key_value_dir_get(self, key):
        return [(name, value) for name, value in dict(self.values).items() if name.startswith(key)]

    def key_value_delete(self, key):
        self.values.pop(key, None)


@pytest.fixture
def watch(monkeypatch):
    """Makes watches of processes on the machines a and b; each notes the reason for which it would end its process."""

    def make(service, index):
        watch = distributed._Watch(None)
        watch.client, watch.index, watch.count, watch.hosts = service, index, 2, ["a", "b"]
        watch.reasons = []
        watch._exit = lambda reason: (watch.reasons.append(reason), watch._ends.set())
        return watch

    monkeypatch.setattr(distributed.ctypes, "CDLL", lambda name: distributed.ctypes)  # SIGABRT is pytest's
    monkeypatch.setattr(distributed.ctypes, "signal", lambda *arguments: None, raising=False)
    for name, value in {"BEAT_SECONDS": 0.002, "SILENT_SECONDS": 0.05}.items():
        monkeypatch.setattr(distributed, name, value)
    return make


def beat(*watches):
    """Lets watches beat in threads; returns these."""
    threads = [threading.Thread(target=each) for watch in watches for each in (watch._beat, watch._count_unanswered)]
    for thread in threads:
        thread.start()
    return threads


def end(watches, threads):
    for watch in watches:
        watch._ends.set()
    for thread in threads:
        thread.join()


def test_one_process_alone_does_nothing(monkeypatch):
    for variable in ("SLURM_STEP_NODELIST", "OMPI_COMM_WORLD_RANK", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(distributed, "_initialize", lambda *arguments: pytest.fail("it starts jax's service"))
    for arguments in (("", 0, -1), ("host:1", 1, 0)):
        with distributed.joined(*arguments):
            assert distributed.is_first()
            assert not distributed.is_several()
            assert distributed.exchange("any", "value") == ["value"]
            distributed.check_same("settings", "value")
            distributed.check_shared(Path("nowhere"))


def test_wrong_flags_are_one_line():
    cases = [
        (("host:1", 2, -1), "come together"),
        (("", 2, 1), "come together"),
        (("host:1", 2, 2), "--process is 2, of 2"),
        (("host", 2, 0), "such as host:12355"),
    ]
    for arguments, words in cases:
        with pytest.raises(UsageError, match=words) as raised, distributed.joined(*arguments):
            pass
        assert is_one_line(raised.value)


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_STEP_NODELIST": "node[1-2]", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "8"},
        {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"},
        {"TPU_WORKER_HOSTNAMES": "a,b,c,d"},
    ],
)
def test_the_environment_says_how_many_there_are(variables, monkeypatch):
    monkeypatch.setattr(os, "environ", variables)
    assert distributed._environment_count() == 4
    monkeypatch.setattr(os, "environ", {"SLURM_NTASKS": "4"})  # of a batch script, which is no step of SLURM
    assert distributed._environment_count() == 1


def test_a_silent_process_is_named_on_all(watch):
    service = Service()
    first, second = watch(service, 0), watch(service, 1)
    threads = beat(first, second)
    time.sleep(0.1)
    assert not first.reasons
    assert not second.reasons
    end([second], threads[2:])  # it shows nothing more
    first._ends.wait(10)
    end([first], threads)
    third = watch(service, 1)  # it learns of it, as any other process
    end([], beat(third))
    assert set(first.reasons) == set(third.reasons) == {"process 1 of 2 on b has ended"}


def test_a_service_that_does_not_answer_is_named(watch):
    service = Service()
    second = watch(service, 1)
    service.key_value_set = lambda *arguments, **options: time.sleep(0.3)
    threads = beat(second)
    second._ends.wait(10)
    end([second], threads)
    assert second.reasons == ["process 0 of 2 on a does not answer"]


def test_a_stopped_process_counts_no_silence(monkeypatch):
    seconds = iter((0.0, 1000.0, 1000.0))
    monkeypatch.setattr(time, "monotonic", lambda: next(seconds))
    assert not distributed._Silence().is_dead()


def test_an_error_is_told_to_the_others(watch):
    service = Service()
    first, second = watch(service, 0), watch(service, 1)
    threads = beat(first)
    second.report(RunError("the disk is full"))
    first._ends.wait(10)
    end([first], threads)
    assert first.reasons == ["process 1 of 2 on b has failed (the disk is full)"]


def test_what_fails_in_one_process_fails_in_all(monkeypatch):
    for text, kind in (("CorruptCheckpointError:x is bad", CorruptCheckpointError), ("OSError:x is bad", RunError)):
        monkeypatch.setattr(distributed, "exchange", lambda purpose, value, text=text: ["", text])
        with pytest.raises(kind, match="process 1: x is bad"), distributed.all_or_none("save"):
            pass
    with pytest.raises(KeyError), distributed.all_or_none("save"):
        raise KeyError("x")


def test_values_are_kept_until_all_have_read_them(watch, monkeypatch):
    service, kept = Service(), []

    def wait_at_barrier(key, milliseconds):
        kept.append([value for name, value in service.values.items() if name.endswith("/0")])
        service.values[f"{key}1"] = "theirs"

    service.wait_at_barrier = wait_at_barrier
    monkeypatch.setattr(distributed, "_watch", watch(service, 0))
    monkeypatch.setattr(distributed, "_asked", collections.Counter())
    for value in "abc":
        assert distributed.exchange("vote", value) == [value, "theirs"]
    assert kept == [["a"], ["a", "b"], ["b", "c"]]  # the other may still read the values before
    assert [value for name, value in service.values.items() if name.endswith("/0")] == ["c"]
