"""Several processes of one run: how they find each other, agree, and end together.

They talk through jax's coordination service, which process 0 hosts. A thread of each shows that it lives. Once one has
failed or is silent, the others name it in one line and end. With one process, all of this does nothing.
"""

import collections
import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from jaxlm.errors import CorruptCheckpointError, RunError, Stopped, UsageError

BEAT_SECONDS = 2.0  # between two signs of life
SILENT_SECONDS, SILENT_BEATS = 20.0, 5  # a process without a sign for both counts as dead
_LEAST_JAX = (0, 10)  # orbax's barriers fail with 0.4.34; none between was tried
FIND_SECONDS = 300  # for all processes to start
_NOT_FOUND = f"the processes did not find each other in {FIND_SECONDS} s: start all, and check their coordinator"
_WAIT_SECONDS = 7 * 24 * 3600  # of jax for a process, dead or late: the watch here is faster, and bears a sleep
_ALIVE, _VERDICT = "jaxlm/alive/", "jaxlm/verdict/"  # keys of the service
# variables that hold the number of processes, where jax recognises the rest of the environment
_COUNTS = {"SLURM_STEP_NODELIST": "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_RANK": "OMPI_COMM_WORLD_SIZE"}
_SHARED_ERRORS = {kind.__name__: kind for kind in (UsageError, RunError, CorruptCheckpointError)}
_TPU_HOSTS = "TPU_WORKER_HOSTNAMES"  # of a pod, separated by commas

_asked: collections.Counter[str] = collections.Counter()
_watch: "_Watch | None" = None


def index() -> int:
    """The number of this process, from 0."""
    return _watch.index if _watch else 0


def is_several() -> bool:
    """Whether this process is one of several."""
    return _watch is not None


def is_first() -> bool:
    """Whether this process writes what only one may write."""
    return index() == 0


def unique(purpose: str) -> str:
    """A name that is new in this process, and the same in all if all ask in the same order for this purpose."""
    _asked[purpose] += 1
    return f"{purpose} {_asked[purpose]}"


def exchange(purpose: str, value: str = "") -> list[str]:
    """The `value` of each process, in their order, once all have called this for this purpose.

    All calls of one purpose come from one thread.
    """
    if not _watch:
        return [value]
    earlier, key = f"jaxlm/{purpose} {_asked[purpose]}/", f"jaxlm/{unique(purpose)}/"
    _watch.client.key_value_set(f"{key}{_watch.index}", value)
    _watch.client.wait_at_barrier(key, 1000 * _WAIT_SECONDS)
    _watch.client.key_value_delete(f"{earlier}{_watch.index}")  # who is here has read it
    values = dict(_watch.client.key_value_dir_get(key))
    return [values[f"{key}{process}"] for process in range(_watch.count)]


def of_first(purpose: str, value: Any) -> Any:
    """The `value` of process 0, which JSON can hold, once all have called this for this purpose."""
    return json.loads(exchange(purpose, json.dumps(value))[0])


@contextlib.contextmanager
def all_or_none(purpose: str) -> Iterator[None]:
    """A context that raises in all processes if it does in one: in the others an error of that kind, or a RunError."""
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    reasons = exchange(purpose, f"{type(failure).__name__}:{failure}" if failure else "")
    if failure:
        raise failure
    for process, (kind, _, reason) in enumerate(each.partition(":") for each in reasons):
        if kind:
            raise _SHARED_ERRORS.get(kind, RunError)(f"process {process}: {reason}")


@contextlib.contextmanager
def first_goes_first(purpose: str) -> Iterator[None]:
    """A context that process 0 leaves before the others enter it."""
    if not is_first():
        exchange(purpose)
    yield
    if is_first():
        exchange(purpose)


def check_shared(workdir: Path) -> None:
    """Raises UsageError if process 0 holds the lock of another directory of this name. All processes call it."""
    exchange("lock")  # it is there once process 0 comes here
    try:
        mark = (workdir / "lock").read_text()
    except OSError:
        mark = ""
    if exchange("lock", mark)[0] != mark:
        raise UsageError(
            f"{workdir} on {socket.gethostname()} is not that of process 0 on {_watch and _watch.hosts[0]}: the"
            " processes of a run need one work directory, in a folder that all machines share"
        )


def check_same(what: str, value: str, advice: str = "start all processes by the same command") -> None:
    """Raises UsageError with `advice` if process 0 has another `value`. All processes call it."""
    if exchange(what, value)[0] != value:
        raise UsageError(f"process {index()} has other {what} than process 0: {advice}")


def capture_stderr(log: Path) -> None:
    """Appends what libraries in C++ print on stderr to a file. Errors of jaxlm still go to stderr."""
    if _watch:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 2)


def before_exit(call: Callable[[], None]) -> None:
    """Calls this, from another thread, before the error of another process ends this one."""
    if _watch:
        _watch.before_exit = call


@contextlib.contextmanager
def joined(coordinator: str, processes: int, process: int) -> Iterator[None]:
    """A context in which this process is one of several, if flags or the environment say so.

    Args:
        coordinator: HOST:PORT of process 0; empty: as the environment says.
        processes: how many there are; 0: as the environment says.
        process: the number of this one; -1: as the environment says.

    At the end the processes wait for each other. Raises UsageError if the flags are incomplete or jax does not
    recognise the environment, RunError if the processes do not find each other, or if another one has failed.
    """
    global _watch
    flags = bool(coordinator), processes > 0, process >= 0
    if any(flags) and not all(flags):
        raise UsageError("--coordinator, --processes and --process come together: give all three, or none")
    if coordinator and not re.fullmatch(r".+:[0-9]+", coordinator):
        raise UsageError(f"--coordinator is {coordinator}: give HOST:PORT of process 0, such as {coordinator}:12355")
    if any(flags) and process >= processes:
        raise UsageError(f"--process is {process}, of {processes} --processes: the numbers begin with 0")
    if not (processes > 1 or (not any(flags) and _environment_count() > 1)):
        yield
        return
    watch = _Watch(_captured_stderr())
    _initialize(*((coordinator, processes, process) if any(flags) else ()))
    _watch = watch
    try:
        watch.start()
        try:
            yield
        except Stopped:
            watch.leave()
            raise
        except BaseException as error:
            watch.report(error)
            raise
        watch.leave()
    finally:
        _watch = None


def _environment_count() -> int:
    """The number of processes that SLURM, Open MPI or a TPU pod has started; 1: this one alone."""
    counts = [os.environ.get(count, "") for mark, count in _COUNTS.items() if mark in os.environ]
    counts.append(str(len(os.environ.get(_TPU_HOSTS, "").split(","))))
    return max(int(count) for count in counts if count.isdecimal())


def _captured_stderr() -> TextIO:
    """Keeps C++ libraries from printing on stderr; returns what is `sys.stderr` then, for the errors of jaxlm."""
    sys.stderr.flush()
    sys.stderr = errors = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
    return errors


def _initialize(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Starts jax's distributed system."""
    import jax

    if jax.__version_info__ < _LEAST_JAX:
        raise UsageError(
            f"several processes need jax {'.'.join(map(str, _LEAST_JAX))} or later, and this is {jax.__version__}"
        )
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would handle SIGTERM
    limits: dict[str, Any] = {"initialization_timeout": FIND_SECONDS, "heartbeat_timeout_seconds": _WAIT_SECONDS}
    try:
        jax.distributed.initialize(coordinator, processes, process, **limits)
    except ValueError as error:
        raise UsageError(
            f"jax does not recognise these processes ({error}): give each --coordinator HOST:PORT --processes N"
            " --process I"
        ) from error
    except Exception as error:  # most failures abort the process instead
        raise RunError(f"{_NOT_FOUND} ({str(error).splitlines()[0]})") from error


class _Watch:
    """Threads that show that this process lives, and end it once another one does not."""

    def __init__(self, errors: TextIO):
        """Prepares for the case that jax aborts this process. `errors` is where its last line goes."""
        self.hosts: list[str] = []
        self.before_exit: Callable[[], None] = lambda: None
        self._errors = errors
        self._service = _Silence()
        self._ends = threading.Event()
        self._once = threading.Lock()
        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._aborts)
        ctypes.CDLL(None).signal(signal.SIGABRT, self._handler)

    def start(self) -> None:
        """Begins to watch, and learns the names of the hosts."""
        from jax._src.distributed import global_state  # the client of the service has no public name

        self.client: Any = global_state.client
        self.index, self.count = global_state.process_id, global_state.num_processes
        self.hosts = [socket.gethostname()] * self.count
        for beat in (self._beat, self._count_unanswered):
            threading.Thread(target=beat, daemon=True).start()
        self.hosts = exchange("host", socket.gethostname())
        if self.index:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 1)

    def _count_unanswered(self) -> None:
        while not self._ends.wait(BEAT_SECONDS):
            if self._service.is_dead():
                self._exit(f"{self._name(0)} does not answer")

    def _beat(self) -> None:
        """Shows that this process lives, and looks for the others. Process 0 decides which one is dead."""
        others = {process: _Silence() for process in range(self.count)}
        beats = 0
        while not self._ends.wait(BEAT_SECONDS):
            beats += 1
            with contextlib.suppress(Exception):  # it is unanswered
                self.client.key_value_set(f"{_ALIVE}{self.index}", str(beats), allow_overwrite=True)
                for _, verdict in self.client.key_value_dir_get(_VERDICT):
                    self._exit(verdict)
                signs = dict(self.client.key_value_dir_get(_ALIVE)) if self.index == 0 else {}
                for process, silence in others.items() if signs else ():
                    if silence.is_dead(signs.get(f"{_ALIVE}{process}", "")):
                        self._condemn(process, "has ended")
                self._service = _Silence()

    def report(self, error: BaseException) -> None:
        """Tells the others why this process ends, unless it ends because of one of them: that one is named then."""
        if _may_come_from_others(error):
            self._ends.wait(1.5 * SILENT_SECONDS)
        expected = isinstance(error, UsageError | RunError | KeyboardInterrupt)
        text = str(error) if expected else f"{type(error).__name__}: {error}"
        self._ends.set()
        with contextlib.suppress(Exception):
            self._condemn(self.index, f"has failed ({' '.join(text.split()) or 'stopped by Ctrl-C'})")
        self._wait_for_others()
        if not expected:
            traceback.print_exception(error)
            os._exit(1)  # the interpreter would wait for the others

    def leave(self) -> None:
        """Waits for the others, and ends the watch."""
        import jax

        exchange("end")
        self._ends.set()
        jax.distributed.shutdown()

    def _condemn(self, process: int, reason: str) -> None:
        """Lets all processes end because of this one."""
        self.client.key_value_set(f"{_VERDICT}{process}", f"{self._name(process)} {reason}")

    def _wait_for_others(self) -> None:
        """Process 0 ends last, as the service ends with it."""
        if self.hosts and self.index == 0:
            time.sleep(2 * BEAT_SECONDS)

    def _name(self, process: int) -> str:
        return f"process {process} of {self.count} on {self.hosts[process]}"

    def _aborts(self, number: int) -> None:
        """Handles SIGABRT: jax aborts the process when the service is gone, or was never found."""
        if self._ends.is_set():
            time.sleep(SILENT_SECONDS)  # the main thread ends the process
        has = "has ended" if self.index else "has aborted (library.log in its work directory says why)"
        self._exit(f"{self._name(0)} {has}" if self.hosts else "")

    def _exit(self, reason: str) -> None:
        """Ends the process with a line of error."""
        with self._once:  # never released
            with contextlib.suppress(Exception):
                self.before_exit()
                stops = "so this run stops: the same command resumes from the last checkpoint"
                line = RunError(f"{reason}, {stops}" if reason else _NOT_FOUND)
                print(f"error: {line}", file=self._errors, flush=True)
            self._wait_for_others()
            os._exit(1)


class _Silence:
    """How long a process has shown no new sign of life."""

    def __init__(self) -> None:
        self._sign, self._since, self._beats = "", time.monotonic(), 0

    def is_dead(self, sign: str = "") -> bool:
        """Takes its last sign; called once a beat. (While this process is stopped, it counts no beats.)"""
        if sign != self._sign:
            self._sign, self._since, self._beats = sign, time.monotonic(), 0
        self._beats += 1
        return self._beats > SILENT_BEATS and time.monotonic() - self._since > SILENT_SECONDS


def _may_come_from_others(error: BaseException) -> bool:
    """Whether it is one of the errors that a collective raises when another process has died."""
    import jax

    cause = error.__cause__ if isinstance(error, RunError) else error
    failed = isinstance(cause, jax.errors.JaxRuntimeError) or "Gloo" in str(cause)
    return failed and "RESOURCE_EXHAUSTED" not in str(cause)
