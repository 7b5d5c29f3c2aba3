"""Which of the plugins that bring jax a GPU is fit to compute here. A plugin that is not chosen is never loaded."""

import importlib.metadata
import importlib.util
import json
import pkgutil
import platform as machine
import sys
from collections.abc import Iterable
from types import ModuleType
from typing import NamedTuple

from jaxlm.device.isolated import run_isolated
from jaxlm.errors import UsageError
from jaxlm.storage import user_cache

LIMIT = 120.0  # seconds for a plugin to start, compile and compute a small model; the first time takes longest

_GROUP = "jax_plugins"  # what jax itself looks under
_NAMES = {"cuda": ("cuda",), "mps": ("mps",), "metal": ("metal", "mtl")}  # a platform's, in the names of its plugins
_METAL_JAX = "0.4.34"  # beside a newer one, jax-metal asks for ENABLE_PJRT_COMPATIBILITY=1


class PluginError(Exception):
    """A plugin cannot be used; the message says why."""


class Plugin(NamedTuple):
    """A plugin that is installed."""

    module: str
    platform: str  # as `config.platform` has it; empty for one that jaxlm does not know
    distribution: str  # empty when it was not installed by pip
    version: str

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}" if self.distribution else f"the plugin {self.module}"


def installed() -> list[Plugin]:
    """The plugins that jax would load, those of NVIDIA GPUs first; none is loaded."""
    found = {}
    package = importlib.util.find_spec(_GROUP)
    places = package.submodule_search_locations if package else None
    for _, module, _ in pkgutil.iter_modules(places or [], f"{_GROUP}."):
        found[module] = Plugin(module, _platform_of(module), "", "")
    for entry in importlib.metadata.entry_points(group=_GROUP):
        by = entry.dist
        found[entry.value] = Plugin(
            entry.value, _platform_of(f"{entry.name} {entry.value}"), by.name if by else "", by.version if by else ""
        )
    order = list(_NAMES)
    return sorted(found.values(), key=lambda plugin: (order.index(plugin.platform) if plugin.platform else 9, plugin))


def _platform_of(name: str) -> str:
    fitting = [platform for platform, words in _NAMES.items() if any(word in name.lower() for word in words)]
    return fitting[0] if fitting else ""


def choose(platform: str) -> tuple[str, str]:
    """The platform to compute on, the CPU's where no plugin is fit, after a line on stderr.

    Args:
        platform: auto, cpu, or the platform whose plugin is the only one that will do.

    Returns:
        jax's name for the platform, and that of its plugin with all versions; empty for the CPU's.

    Raises:
        UsageError: the platform that is named has no plugin here, or an unfit one.
    """
    found = installed()
    reasons = []
    for plugin in found:
        if plugin.platform and platform in ("auto", plugin.platform):
            try:
                name = try_out(plugin)
            except PluginError as error:
                reasons.append(f"{_with_versions(plugin)}, which {error}")
            else:
                _tell(reasons)
                leave_out(other for other in found if other != plugin)
                return name, _with_versions(plugin)
    if platform not in ("auto", "cpu"):
        reason = "; ".join(reasons) or f"platform {platform} is not here: install its plugin"
        raise UsageError(f"{reason}, or try --config.platform=auto")
    _tell(reasons)
    leave_out(found)
    return "cpu", ""


def refuse_unfit(names: str) -> None:
    """Raises UsageError if a plugin of these platforms, jax's names with commas between them, is not made for jax."""
    platforms = [_platform_of(name) for name in names.split(",")]
    for plugin in installed():
        if plugin.platform in platforms:
            try:
                check_versions(plugin)
            except PluginError as error:
                raise UsageError(f"{_with_versions(plugin)}, which JAX_PLATFORMS names, {error}") from error


def _with_versions(plugin: Plugin) -> str:
    return f"{plugin} (with jax {version_of('jax')}, jaxlib {version_of('jaxlib')})"


def _tell(reasons: list[str]) -> None:
    for reason in reasons:
        print(f"Computing without {reason}", file=sys.stderr)


def leave_out(plugins: Iterable[Plugin]) -> None:
    """Has jax, which loads all plugins that it finds, find empty modules in these plugins' places."""
    for plugin in plugins:
        empty = ModuleType(plugin.module)
        empty.initialize = lambda: None  # type: ignore[attr-defined]
        sys.modules[plugin.module] = empty


def try_out(plugin: Plugin, anew: bool = False) -> str:
    """jax's name for a plugin's platform; what was found fit once is remembered, unless it is to be tried `anew`.

    Raises:
        PluginError: it must not compute here.
    """
    check_versions(plugin)
    versions = {name: version_of(name) for name in ("jax", "jaxlib", "jaxlm")}
    key = [plugin, versions, sys.version, machine.platform()]
    if anew:
        user_cache.put("plugin", key, None)
    name = user_cache.get("plugin", key)
    if not isinstance(name, str):
        name = probe(plugin)
        user_cache.put("plugin", key, name)
    return name


def check_versions(plugin: Plugin) -> None:
    """Raises PluginError if the plugin is Apple's and jax is not the one that it is made for, which no pip sees to."""
    if plugin.distribution != "jax-metal":
        return
    for name in ("jax", "jaxlib"):
        if version_of(name) != _METAL_JAX:
            raise PluginError(
                f"is made for jax {_METAL_JAX}: have jax=={_METAL_JAX} jaxlib=={_METAL_JAX} by"
                " pip install -e '.[metal]', or take jax-mps"
            )


def version_of(distribution: str) -> str:
    """Which version of a distribution is installed; empty for none."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def probe(plugin: Plugin) -> str:
    """Has a process of its own load this plugin alone and compute with it (`jaxlm.device.probe`).

    Returns:
        jax's name for its platform.

    Raises:
        PluginError: it raises, hangs, crashes, finds no device or computes something else than NumPy.
    """
    command = ["-m", "jaxlm.device.probe", plugin.module]
    lines, failure = run_isolated(command, LIMIT, {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"})
    try:
        answer = json.loads(lines[-1])
        name, wrong = answer["name"], answer["failure"]
    except (IndexError, ValueError, KeyError, TypeError) as error:
        last = next((f" after {line.strip()!r:.200}" for line in reversed(lines) if line.strip()), "")
        raise PluginError(f"{failure or 'crashes: no answer'}{last}") from error
    if wrong:
        raise PluginError(wrong)
    return name
