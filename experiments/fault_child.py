"""A session of a command under faults: the faults inside it, and how it is started.

python -m experiments.fault_child FAULTS MODULE ARGUMENTS is a session of the command MODULE, such as jaxlm.main. FAULTS
is JSON: `home`, the folder in which the session runs; `log`, a file for the events, or null; and `faults`. A fault
strikes `delay` seconds after the `count`-th event that matches its regular expression `event`; `act` names what it
does. Events are lines of text in the order of time. Each is written just before the thing happens, except `sync`:

    start                           anything of jaxlm is imported
    compile                         the training step is compiled
    micro-step N                    the session's N-th micro-batch goes to the device
    open PATH SIZE                  a file is opened for writing; SIZE bytes of it stay
    rename PATH PATH, mkdir PATH, remove PATH, rmdir PATH, truncate PATH
    write PATH                      os.write adds to a file
    sync PATH SIZE                  a file, of SIZE bytes, has reached the disk

PATH is relative to `home`; changes elsewhere are no events. Only changes made by Python are seen, not those
of C++ libraries: an audit hook reports most, and wrapped functions report the rest.
"""

import contextlib
import fcntl
import itertools
import json
import os
import re
import resource
import runpy
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

CHANGE = "(open|rename|mkdir|remove|rmdir|truncate|write) "
DESCRIPTORS = {
    "os.rename": (2, 3),
    "os.mkdir": (2,),
    "os.remove": (1,),
    "os.rmdir": (1,),
    "os.truncate": (),
}  # where in the event

TIME_LIMIT = 300  # seconds for anything that is waited for
TRAIN = ("jaxlm.main", "--config=tiny.py", "--workdir=run")
ENVIRONMENT = {
    "PYTHONPATH": str(Path(__file__).parent.parent),
    "JAX_PLATFORMS": "cpu",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}

Fault = dict[str, Any]
Ended = subprocess.CompletedProcess[str]
system_write, system_open = os.write, os.open


class Session:
    """The events of this process and its pending faults."""

    def __init__(self, home: str, log: str | None, faults: list[Fault]):
        self.home = home
        self.log = system_open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666) if log else None
        self.waiting = [(fault, itertools.count(1)) for fault in faults]
        self.writing: tuple[int, bytes] = (-1, b"")
        self.micro_steps = itertools.count(1)
        self.halted = False  # nothing happens any more: the process must leave by itself
        self.delay = 0.0  # seconds that each change and sync takes longer
        self.refused: dict[str, int] = {}  # the error numbers of what this disk cannot do

    def happens(self, event: str) -> None:
        """Triggers the faults of this event, then logs it."""
        while self.halted:
            time.sleep(1)
        for fault, seen in self.waiting:
            if re.match(fault["event"], event) and next(seen) == fault["count"]:
                self.strike(fault)
        if self.log is not None:
            system_write(self.log, f"{event}\n".encode())
        if self.delay and re.match(f"{CHANGE}|sync ", event):
            time.sleep(self.delay)

    def strike(self, fault: Fault) -> None:
        """Acts at once, or from a thread after the delay."""
        act = ACTS[fault["act"]]
        if not fault["delay"]:
            return act(self, fault)
        timer = threading.Timer(fault["delay"], act, (self, fault))
        timer.daemon = True
        timer.start()

    def place(self, path: Any, directory: int = -1) -> str | None:
        """The path relative to `home`; None if it is elsewhere."""
        if isinstance(path, int):
            path = path_of(path)
            if not os.path.isabs(path):  # a pipe
                return None
        elif directory >= 0:
            path = os.path.join(path_of(directory), os.fsdecode(path))
        path = os.path.abspath(os.fsdecode(path))
        return os.path.relpath(path, self.home) if f"{path}/".startswith(f"{self.home}/") else None

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Reports a change to the disk just before it happens."""
        if event == "open":
            path, _, flags = arguments
            if (flags or 0) & (os.O_WRONLY | os.O_RDWR) and not isinstance(path, int) and (place := self.place(path)):
                stays = 0 if flags & os.O_TRUNC or not os.path.exists(path) else os.path.getsize(path)
                self.happens(f"open {place} {stays}")
        elif event in DESCRIPTORS:
            descriptors = [arguments[i] for i in DESCRIPTORS[event]] or [-1]
            places = [self.place(*pair) for pair in zip(arguments, descriptors, strict=False)]
            ours = [place for place in places if place]
            if ours == places:
                self.happens(" ".join([event.removeprefix("os."), *ours]))

    def refuse(self, what: str) -> None:
        if number := self.refused.get(what):
            raise OSError(number, os.strerror(number))

    def wrap(self) -> None:
        """Wraps the functions that the audit hook does not report."""

        def write(descriptor: int, data: bytes) -> int:
            if place := self.place(descriptor):
                self.writing = descriptor, data
                self.happens(f"write {place}")
            return system_write(descriptor, data)

        def syncing(sync: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(file: Any, *arguments: Any) -> Any:
                descriptor = file if isinstance(file, int) else file.fileno()
                status = os.fstat(descriptor)
                is_sync = not arguments or arguments[0] == getattr(fcntl, "F_FULLFSYNC", None)
                if is_sync and stat.S_ISDIR(status.st_mode):
                    self.refuse("directory sync")
                result = sync(file, *arguments)
                if is_sync and stat.S_ISREG(status.st_mode) and (place := self.place(descriptor)):
                    self.happens(f"sync {place} {status.st_size}")
                return result

            return wrapped

        def locking(lock: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*arguments: Any) -> Any:
                self.refuse("lock")
                return lock(*arguments)

            return wrapped

        os.write, os.fsync, fcntl.fcntl = write, syncing(os.fsync), syncing(fcntl.fcntl)
        fcntl.flock, fcntl.lockf = locking(fcntl.flock), locking(fcntl.lockf)
        if hasattr(os, "fdatasync"):
            os.fdatasync = syncing(os.fdatasync)


class Step:
    """A training step that reports its compilation and its calls."""

    def __init__(self, step: Any, session: Session):
        self.step, self.session = step, session

    def __call__(self, *arguments: Any) -> Any:
        self.session.happens(f"micro-step {next(self.session.micro_steps)}")
        return self.step(*arguments)

    def lower(self, *arguments: Any) -> "Step":
        self.session.happens("compile")
        return Step(self.step.lower(*arguments), self.session)

    def compile(self) -> "Step":
        return Step(self.step.compile(), self.session)


def path_of(descriptor: int) -> str:
    """The path under which a file is open."""
    if hasattr(fcntl, "F_GETPATH"):  # macOS
        return os.fsdecode(fcntl.fcntl(descriptor, fcntl.F_GETPATH, bytes(1024)).rstrip(b"\0"))
    return os.readlink(f"/proc/self/fd/{descriptor}")


def tear(session: Session, fault: Fault) -> None:
    """Writes part of the data, and kills the process."""
    descriptor, data = session.writing
    system_write(descriptor, data[: int(len(data) * fault["share"])])
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt_twice(session: Session, fault: Fault) -> None:
    """Sends two SIGINTs to this thread, where they arrive at once and never merge; halts the run before it can save."""
    session.halted = True
    for _ in range(2):
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)


def fail(session: Session, fault: Fault) -> None:
    raise RuntimeError("a fault in the step")


def fill(session: Session, fault: Fault) -> None:
    """Fills the disk with the file `ballast`; without one, forbids this process to write to any file."""
    if not fault["ballast"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return
    with open(fault["ballast"], "wb", buffering=0) as file:
        for size in (2**20, 2**12, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))


def free(session: Session, fault: Fault) -> None:
    """Makes room again."""
    if fault["ballast"]:
        os.remove(fault["ballast"])
    else:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def slow(session: Session, fault: Fault) -> None:
    session.delay = fault["seconds"]


def limit(session: Session, fault: Fault) -> None:
    """As in a small container: few open files, no home directory, no place for temporary files, one core."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (fault["files"], fault["files"]))
    nowhere = os.path.join(os.devnull, "nowhere")  # not even root can create it
    os.environ.update(HOME=nowhere, XDG_CACHE_HOME="", TMPDIR=nowhere)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


ACTS: dict[str, Callable[[Session, Fault], None]] = {
    "kill": lambda session, fault: os.kill(os.getpid(), signal.SIGKILL),
    "tear": tear,
    "terminate": lambda session, fault: os.kill(os.getpid(), signal.SIGTERM),
    "interrupt": lambda session, fault: os.kill(os.getpid(), signal.SIGINT),
    "interrupt twice": interrupt_twice,
    "stop": lambda session, fault: os.kill(os.getpid(), signal.SIGSTOP),
    "fail": fail,
    "fill": fill,
    "free": free,
    "slow": slow,
    "limit": limit,
    "refuse": lambda session, fault: session.refused.update(fault["refused"]),
    "move": lambda session, fault: os.rename(fault["path"], fault["target"]),
}


# Around a session


class Failed(Exception):
    """A run did not do what it must under a fault."""


def expect(condition: Any, what: str, session: Ended) -> None:
    if not condition:
        output = "\n".join((session.stdout + session.stderr).splitlines()[-12:])
        raise Failed(f"{what}; exit status {session.returncode} after\n{output}")


def start(
    home: Path, *faults: Fault, words: Sequence[str] = TRAIN, log: Path | None = None, cache: bool = True
) -> subprocess.Popen:
    """Starts a session of the command `words` in the folder `home`."""
    spec = {"home": str(home), "log": log and str(log), "faults": faults}
    child = ["experiments.fault_child", json.dumps(spec)] if faults or log else []
    cached = {"JAX_ENABLE_COMPILATION_CACHE": str(cache).lower()}  # jaxlm disables it on a jax that cannot use it
    return subprocess.Popen(
        [sys.executable, "-m", *child, *words],
        cwd=home,
        env=os.environ | ENVIRONMENT | cached,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )


def ended(process: subprocess.Popen) -> Ended:
    """Waits for the end of a session. Raises Failed if it hangs."""
    try:
        out, err = process.communicate(timeout=TIME_LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        raise Failed(f"it hung for {TIME_LIMIT} s after\n{process.communicate()}") from None
    return Ended(process.args, process.returncode, out, err)


@contextlib.contextmanager
def held(process: subprocess.Popen) -> Iterator[None]:
    """Waits until a session has stopped itself, and continues it on exit."""
    deadline = time.monotonic() + TIME_LIMIT
    options = os.WSTOPPED | os.WEXITED | os.WNOHANG | os.WNOWAIT
    while os.waitid(os.P_PID, process.pid, options) is None and time.monotonic() < deadline:
        time.sleep(0.02)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


def main() -> None:
    session = Session(**json.loads(sys.argv[1]))
    session.happens("start")
    import jaxlm.run.trainer

    make_train_step = jaxlm.run.trainer.make_train_step
    jaxlm.run.trainer.make_train_step = lambda *a: Step(make_train_step(*a), session)
    session.wrap()
    sys.addaudithook(session.audit)
    module, sys.argv[1:] = sys.argv[2], sys.argv[3:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
