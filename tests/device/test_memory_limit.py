"""The memory limit of a process, in trees of files as Linux shows them."""

import math
import resource
from pathlib import Path

import pytest

from jaxlm.device import memory_limit
from jaxlm.device.memory_limit import group_limit

V1_NONE = "9223372036854771712\n"  # what version 1 has without a limit
HYBRID = "12:cpu,cpuacct:/job\n9:memory:/job\n1:name=systemd:/user.slice\n0::/user.slice\n"


def tree(root: Path, groups: str | None, **limits: str) -> Path:
    """Writes /proc/self/cgroup and files below /sys/fs/cgroup, whose names have __ for a slash."""
    if groups is not None:
        (root / "proc/self").mkdir(parents=True)
        (root / "proc/self/cgroup").write_text(groups)
    for name, text in limits.items():
        file_name = "memory.limit_in_bytes" if name.startswith("memory__") else "memory.max"
        file = root / "sys/fs/cgroup" / name.replace("__", "/") / file_name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


@pytest.mark.parametrize(
    ("groups", "limits", "expected"),
    [
        ("0::/\n", {".": "5000\n"}, 5000),  # a container with a namespace of its own
        ("0::/\n", {".": "max\n"}, math.inf),
        ("0::/a.slice/b.service\n", {"a.slice": "max\n", "a.slice__b.service": "7000\n"}, 7000),
        ("0::/a.slice/b.service\n", {"a.slice": "6000\n", "a.slice__b.service": "7000\n"}, 6000),
        ("0::/a.slice/b.service\n", {"a.slice__b.service": "max\n", "c.slice": "1\n"}, math.inf),  # another's limit
        ("0::/host/path\n", {".": "5000\n"}, 5000),  # the path on the host, which the container does not see
        ("0::/../../job\n", {".": "5000\n", "job": "1\n"}, 5000),  # outside the namespace
        ("0::/job:1\n", {"job:1": "8000\n"}, 8000),
        ("9:memory:/docker/abc\n0::/\n", {"memory__": "3000\n"}, 3000),
        ("9:memory:/job/step\n", {"memory__": V1_NONE, "memory__job": "4000\n", "memory__job__step": V1_NONE}, 4000),
        (HYBRID, {"memory__job": "4000\n", "unified__user.slice": "max\n"}, 4000),
        (HYBRID, {"memory__job": "4000\n", "unified__user.slice": "2000\n"}, 2000),
        (HYBRID, {"memory__user.slice": "1\n"}, math.inf),  # another controller's path
        (None, {".": "5000\n"}, 5000),
        (None, {}, math.inf),  # macOS
        ("no line of a kernel\n", {".": "\n"}, math.inf),
    ],
)
def test_the_smallest_limit_on_the_way_up_counts(tmp_path, groups, limits, expected):
    assert group_limit(tree(tmp_path, groups, **limits)) == expected


def test_version_1_without_a_limit_exceeds_any_machine(tmp_path):
    assert group_limit(tree(tmp_path, "9:memory:/\n", memory__=V1_NONE)) > 2**62


def test_what_cannot_be_read_is_no_limit(tmp_path):
    tree(tmp_path, "0::/job\n", job="7000\n")
    (tmp_path / "sys/fs/cgroup/memory.max").mkdir()
    assert group_limit(tmp_path) == 7000
    (tmp_path / "proc/self/cgroup").unlink()
    (tmp_path / "proc/self/cgroup").mkdir()
    assert group_limit(tmp_path) == math.inf


@pytest.mark.parametrize("kind", [resource.RLIMIT_AS, resource.RLIMIT_DATA])
def test_the_limits_of_the_process_count(tmp_path, monkeypatch, kind):
    limits = {kind: 4000}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits.get(kind, resource.RLIM_INFINITY), 9000))
    root = tree(tmp_path, "0::/\n", **{".": "5000\n"})
    assert memory_limit.memory_limit(root) == 4000
    limits.clear()
    assert memory_limit.memory_limit(root) == 5000
