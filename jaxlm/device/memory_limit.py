"""The memory that this process may have: limits of its control groups (Linux) and of the process itself."""

import math
import re
import resource
from pathlib import Path

# the controller ("" in version 2), the directory of its groups, the file with a group's limit
_MOUNTS = (
    ("", "sys/fs/cgroup", "memory.max"),
    ("", "sys/fs/cgroup/unified", "memory.max"),
    ("memory", "sys/fs/cgroup/memory", "memory.limit_in_bytes"),
)


def memory_limit(root: Path = Path("/")) -> float:
    """Bytes that this process may have; infinite without a limit.

    Args:
        root: the directory with `proc` and `sys`.
    """
    limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    return min([group_limit(root), *(limit for limit in limits if limit != resource.RLIM_INFINITY)])


def group_limit(root: Path) -> float:
    """The smallest limit of the process's control groups and of all groups above them.

    In a container the mount's root may be the process's own group, while `/proc/self/cgroup` has its path on the host.
    So groups that do not exist are skipped, and the root is always read.
    """
    limits = [math.inf]
    for controller, mount, name in _MOUNTS:
        group = root / mount / _group_path(root, controller)
        for directory in (group, *group.parents):
            limits += _read_limit(directory / name)
    return min(limits)


def _group_path(root: Path, controller: str) -> str:
    """The path of the process's group below the mount; empty for the root."""
    try:
        lines = (root / "proc/self/cgroup").read_text(errors="replace")
    except OSError:
        return ""
    for controllers, path in re.findall(r"^\d+:([^:]*):/(.*)$", lines, re.MULTILINE):
        if controller in controllers.split(","):
            return path
    return ""


def _read_limit(file: Path) -> list[int]:
    try:
        text = file.read_text().strip()
    except OSError:
        return []
    return [int(text)] if text.isdigit() else []  # version 2 has "max", version 1 a number that no machine reaches
