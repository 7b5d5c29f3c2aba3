"""Finds the plugins that bring jax a GPU, and chooses one that computes right. No other plugin is loaded."""

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

LIMIT = 120.0  # seconds for a plugin to start, compile and run a small model; the first time takes longest

_GROUP = "jax_plugins"  # the package and the group of entry points in which jax looks
_WORDS = {"cuda": ("cuda",), "mps": ("mps",), "metal": ("metal", "mtl")}  # in the names of a platform's plugins
_METAL_JAX = "0.4.34"  # beside a newer one, jax-metal asks for ENABLE_PJRT_COMPATIBILITY=1
_MPS_VERSIONS = {"0.10": "0.10.11", "0.11": "0.11.1"}  # the jax-mps for a minor version of jaxlib


class PluginError(Exception):
    """A plugin cannot be used; the message says why."""


class Plugin(NamedTuple):
    """An installed plugin."""

    module: str
    platform: str  # as in `config.platform`; empty if jaxlm does not know it
    distribution: str  # empty if pip did not install it
    version: str

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}" if self.distribution else f"the plugin {self.module}"


def installed() -> list[Plugin]:
    """The plugins that jax would load, those for NVIDIA GPUs first; loads none."""
    by_module = {}
    package = importlib.util.find_spec(_GROUP)
    directories = package.submodule_search_locations if package else None
    for _, module, _ in pkgutil.iter_modules(directories or [], f"{_GROUP}."):
        by_module[module] = Plugin(module, _platform_of(module), "", "")
    for entry in importlib.metadata.entry_points(group=_GROUP):
        platform = _platform_of(f"{entry.name} {entry.value}")
        name, version = (entry.dist.name, entry.dist.version) if entry.dist else ("", "")
        by_module[entry.value] = Plugin(entry.value, platform, name, version)
    order = [*_WORDS, ""]
    return sorted(by_module.values(), key=lambda plugin: (order.index(plugin.platform), plugin))


def _platform_of(name: str) -> str:
    return next((platform for platform, words in _WORDS.items() if any(word in name.lower() for word in words)), "")


def choose(platform: str) -> tuple[str, str]:
    """Chooses the first plugin that computes right, else the CPU, and prints a line on stderr for each one left out.

    Args:
        platform: auto, cpu, or the platform of the only plugins to consider.

    Returns:
        jax's name for the platform, and the plugin with all versions (empty for the CPU).

    Raises UsageError if the named platform has no plugin that can be used.
    """
    plugins = installed()
    reasons = []
    name, chosen = "cpu", None
    for plugin in plugins:
        if plugin.platform and platform in ("auto", plugin.platform):
            try:
                name, chosen = verify(plugin), plugin
                break
            except PluginError as error:
                reasons.append(f"{_with_versions(plugin)}, which {error}")
    if not chosen and platform not in ("auto", "cpu"):
        reason = "; ".join(reasons) or f"platform {platform} is not here: install its plugin"
        raise UsageError(f"{reason}, or try --config.platform=auto")
    for reason in reasons:
        print(f"Computing without {reason}", file=sys.stderr)
    disable(plugin for plugin in plugins if plugin != chosen)
    return name, _with_versions(chosen) if chosen else ""


def refuse_wrong_versions(names: str) -> None:
    """Raises UsageError if a plugin is made for another jax.

    Args:
        names: the value of JAX_PLATFORMS, which names the plugins' platforms.
    """
    platforms = [_platform_of(name) for name in names.split(",")]
    for plugin in installed():
        if plugin.platform in platforms:
            try:
                check_versions(plugin)
            except PluginError as error:
                raise UsageError(f"{_with_versions(plugin)}, which JAX_PLATFORMS names, {error}") from error


def _with_versions(plugin: Plugin) -> str:
    return f"{plugin} (with jax {version_of('jax')}, jaxlib {version_of('jaxlib')})"


def disable(plugins: Iterable[Plugin]) -> None:
    """Puts empty modules in the place of plugins, as jax loads all that it finds."""
    for plugin in plugins:
        empty = ModuleType(plugin.module)
        empty.initialize = lambda: None  # type: ignore[attr-defined]
        sys.modules[plugin.module] = empty


def verify(plugin: Plugin, refresh: bool = False) -> str:
    """Returns jax's name for a plugin's platform, from the user's cache unless `refresh` is set.

    Raises PluginError if the plugin cannot be used. This is not cached.
    """
    check_versions(plugin)
    versions = {name: version_of(name) for name in ("jax", "jaxlib", "jaxlm")}
    key = [plugin, versions, sys.version, machine.platform()]
    if refresh:
        user_cache.put("plugin", key, None)
    name = user_cache.get("plugin", key)
    if not isinstance(name, str):
        name = probe(plugin)
        user_cache.put("plugin", key, name)
    return name


def check_versions(plugin: Plugin) -> None:
    """Raises PluginError if jax-metal or jax-mps is made for another jax than is installed."""
    jax, jaxlib = version_of("jax"), version_of("jaxlib")
    if plugin.distribution == "jax-metal" and (jax, jaxlib) != (_METAL_JAX, _METAL_JAX):
        raise PluginError(
            f"is made for jax {_METAL_JAX}: get jax=={_METAL_JAX} jaxlib=={_METAL_JAX} by"
            " pip install 'jaxlm[metal]', or use jax-mps"
        )
    minor, jaxlib_minor = (".".join(version.split(".")[:2]) for version in (plugin.version, jaxlib))
    if plugin.distribution == "jax-mps" and minor != jaxlib_minor:
        target = next(name for name in (jaxlib_minor, minor, *reversed(_MPS_VERSIONS)) if name in _MPS_VERSIONS)
        jax_pins = f" 'jax=={target}.*' 'jaxlib=={target}.*'" if target != jaxlib_minor else ""
        raise PluginError(f"is made for another jaxlib: pip install jax-mps=={_MPS_VERSIONS[target]}{jax_pins}")


def version_of(distribution: str) -> str:
    """The version of an installed distribution; empty if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def probe(plugin: Plugin) -> str:
    """Loads a plugin in a process of its own and compares a small model with the CPU (`jaxlm.device.probe`).

    Returns:
        jax's name for its platform.

    Raises PluginError if it raises, hangs, crashes, finds no device or computes wrong numbers.
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
