"""Faults around a run: odd names, a person's files beside ours, folders that move, slow and limited systems.

Each function trains a run under its fault to the end and returns the steps repeated after each strike.
"""

import errno
import math
import shutil
from pathlib import Path

from experiments.fault_child import CHANGE, TRAIN, Ended, Failed, Fault, expect
from experiments.fault_place import ACCUMULATED, SAVE_INTERVAL, Place
from experiments.fault_trials import killed, mounted

ODD_NAMES = ("[proj]", "a*b?", "back\\slash", "two  blanks ", "größe 日本", "{a,b}", "~", "-x", "%s", "#1;$HOME", "'\"")
FOREIGN = (
    "x.gguf",
    ".git/HEAD",
    "notes.txt",
    "12.bak/array",
    "model.safetensors.tmp",
    "config.json.tmp",
    "README.md.bak",
)
EXPORT = ("jaxlm.export", "--workdir=run", "--out=exported", "--overwrite")


def odd_names(place: Place, home: Path) -> list[int]:
    """SIGKILL at any moment, in a folder below others with odd names."""
    return killed("start", place, home.joinpath(*place.rng.sample(ODD_NAMES, 2)), longest=math.inf)


def foreign_files(place: Place, home: Path) -> list[int]:
    """SIGKILL before any disk change, with a person's files in our folders: they stay, through kills and the end."""
    shutil.copytree(place.half_done, home)
    _put(home)
    repeated = killed(CHANGE, place, home)
    _expect_foreign(home)
    readme = home / "run/final_model/README.md"
    readme.write_text("my own words\n")
    place.finish(home)
    _expect_foreign(home)
    if readme.read_text() != "my own words\n":
        raise Failed("a second session has replaced the README of a finished model")
    return repeated


def _put(home: Path) -> None:
    for path in _foreign_paths(home):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"mine: {path.name}")


def _foreign_paths(home: Path) -> list[Path]:
    return [home / "run" / folder / name for folder in ("", "checkpoints", "final_model") for name in FOREIGN]


def _expect_foreign(home: Path) -> None:
    lost = [path for path in _foreign_paths(home) if not path.exists() or path.read_text() != f"mine: {path.name}"]
    if lost:
        raise Failed(f"files of a person are lost: {', '.join(str(path.relative_to(home)) for path in lost)}")


def killed_with_saves_by_time(place: Place, home: Path) -> list[int]:
    """SIGKILL before any change to the checkpoints, where a rolling one is saved all the time."""
    return killed(r"\w+ run/checkpoints/", place, home, words=(*TRAIN, "--config.save_minutes=0.001"))


def linked_model(place: Place, home: Path) -> list[int]:
    """SIGKILL while the final model is written through a link to another disk."""
    shutil.copytree(place.half_done, home)
    mounted(home / "elsewhere")
    (home / "run/final_model").symlink_to(home / "elsewhere")
    repeated = killed(r"\w+ (run/\.?final_model|elsewhere)", place, home)
    if not (home / "run/final_model").is_symlink():
        raise Failed("the link is replaced")
    return repeated


def export_killed(place: Place, home: Path) -> list[int]:
    """SIGKILL while an export replaces an earlier one: the model is the old or the new, and a repetition is whole."""
    shutil.copytree(place.done, home)
    old_step, new_step = sorted(int(path.name) for path in (home / "run/checkpoints").iterdir())[-2:]
    old, new = ((*EXPORT, f"--step={step}") for step in (old_step, new_step))
    exported, log = home / "exported", home.with_suffix(".log")
    session = place.session(home, words=new, log=log)
    new_files = _files(exported)
    changes = log.read_text().count("\n") - 1
    session = place.session(home, words=old)
    old_files = _files(exported)
    expect(old_files and new_files and old_files != new_files, "the exports are not as expected", session)
    (exported / "thesis.txt").write_text("mine")
    kill: Fault = {"event": CHANGE, "count": place.rng.randint(1, changes), "delay": 0, "act": "kill"}
    session = place.session(home, kill, words=new)
    model = _files(exported).get("model.safetensors")
    expect(model in (old_files["model.safetensors"], new_files["model.safetensors"]), "no model is whole", session)
    session = place.session(home, words=new)
    whole = _files(exported) == new_files | {"thesis.txt": b"mine"}
    expect(whole and session.returncode == 0, f"there are {sorted(_files(exported))}, or others in them", session)
    return [0]


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def workdir_renamed(place: Place, home: Path) -> list[int]:
    """The work directory is renamed while the run trains: it stops soon, and continues when it is moved back."""
    log, moved = home.with_suffix(".log"), home / "moved"
    fault = place.fault(r"micro-step [12]?\d$", "move", path=str(home / "run"), target=str(moved))
    session = place.session(home, fault, log=log)
    lines = log.read_text().splitlines()
    later = sum(line.startswith("micro-step ") for line in lines[lines.index("rename run moved") :])
    _expect_refusal(session, 1)
    expect("make room" not in session.stderr, "the advice does not fit", session)
    expect(later <= ACCUMULATED * (SAVE_INTERVAL + 1), f"it trained {later} more micro-batches", session)
    expect(not any((home / "run").rglob("*")), "it wrote to a new work directory", session)
    moved.rename(home / "run")
    return [place.finish(home)[0]]


def checkpoints_moved(place: Place, home: Path) -> list[int]:
    """The checkpoints are away between two sessions: the run is refused, and continues when they are back."""
    shutil.copytree(place.half_done, home)
    (home / "run/checkpoints").rename(home / "away")
    before = _files(home)
    session = place.session(home)
    _expect_refusal(session, 2)
    expect(_files(home) == before, "files have changed", session)
    shutil.rmtree(home / "run/checkpoints", ignore_errors=True)
    (home / "away").rename(home / "run/checkpoints")
    return [place.finish(home)[0]]


def _expect_refusal(session: Ended, status: int) -> None:
    in_one_line = session.stderr.startswith("error: ") and session.stderr.count("\n") == 1
    expect(session.returncode == status and in_one_line, f"it does not end in one line and {status}", session)


def corpus_changed(place: Place, home: Path) -> list[int]:
    """The text changes or is gone between two sessions: the run continues with its own tokens, and says so."""
    shutil.copytree(place.half_done, home)
    text = home / "text.txt"
    gone = place.rng.random() < 0.3
    text.unlink() if gone else text.write_text(place.text[place.rng.randrange(1, 1000) :])
    repeated, session = place.finish(home)
    expect(gone or "text.txt" in session.stdout + session.stderr, "it does not say so", session)
    return [repeated]


def killed_on_a_slow_disk(place: Place, home: Path) -> list[int]:
    """SIGKILL before any disk change, where each takes so long that saves last longer than their interval."""
    return killed(CHANGE, place, home, beside=[_slow(place)])


def _slow(place: Place) -> Fault:
    return _from_start("slow", seconds=place.rng.uniform(0.005, 0.05))


def limited_by(place: Place, home: Path, fault: Fault) -> list[int]:
    """A session under a fault from its start ends as others do."""
    session = place.session(home, fault)
    expect(session.returncode == 0 and "not saved" not in session.stdout, "it did not end in order", session)
    return [0]


def slow_disk(place: Place, home: Path) -> list[int]:
    return limited_by(place, home, _slow(place))


def no_directory_sync(place: Place, home: Path) -> list[int]:
    """The disk cannot sync a directory, as CIFS, VirtualBox and some FUSE systems."""
    number = place.rng.choice([errno.EINVAL, errno.ENOTSUP])
    return limited_by(place, home, _from_start("refuse", refused={"directory sync": number}))


def no_locks(place: Place, home: Path) -> list[int]:
    """The disk cannot lock a file, as some network systems."""
    number = place.rng.choice([errno.ENOLCK, errno.ENOTSUP])
    return limited_by(place, home, _from_start("refuse", refused={"lock": number}))


def small_container(place: Place, home: Path) -> list[int]:
    """One core, 256 open files, no home directory and no place for temporary files."""
    return limited_by(place, home, _from_start("limit", files=256))


def _from_start(act: str, **more: object) -> Fault:
    return {"event": "start", "count": 1, "delay": 0, "act": act, **more}
