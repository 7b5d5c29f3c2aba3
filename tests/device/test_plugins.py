"""Plugins that fail, each a small package that is installed for one test.

It registers a second CPU client under the name mps, or fails to in its own way. Its faults do not reach the first one.
"""

import logging
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxlm.device import backend, numerics, plugins
from jaxlm.device import probe as probe_program
from jaxlm.device.plugins import Plugin, PluginError, check_versions, choose, installed, probe, verify
from jaxlm.errors import UsageError
from tests.tiny_run import is_one_line

REPOSITORY = Path(__file__).parents[2]
JAX, JAXLIB = plugins.version_of("jax"), plugins.version_of("jaxlib")
MINOR = ".".join(JAXLIB.split(".")[:2])
VERSION = f"{MINOR}.11"  # of a jax-mps that is made for this jax
MPS = Plugin("jax_plugins.mps", "mps", "jax-mps", VERSION)

PLUGIN = """
import os, signal, time
from jax import lax
from jax._src.xla_bridge import make_cpu_client
from jax.extend.backend import register_backend_factory
from jax.interpreters import mlir

clients = []


def compute_instead(primitive, function, shape=None):
    entry = mlir._platform_specific_lowerings["cpu"].get(primitive) or mlir._lowerings[primitive]
    right, wrong = getattr(entry, "rule", entry), mlir.lower_fun(function, multiple_results=False)

    def lowering(context, *operands, **parameters):
        module = context.module_context
        client = module.backend if hasattr(module, "backend") else module.backend_or_name
        is_wrong = client in clients and shape in (None, context.avals_out[0].shape)
        return (wrong if is_wrong else right)(context, *operands, **parameters)

    mlir.register_lowering(primitive, lowering, platform="cpu")


def start():
    clients.append(make_cpu_client())
    return clients[0]


def initialize():
    register_backend_factory("mps", start, priority=500, fail_quietly=False)
"""
START, INITIALIZE = "def start():\n", "def initialize():\n"


def faulty(where: str, code: str) -> str:
    """The plugin with code at the start of a function."""
    assert PLUGIN.count(where) == 1
    return PLUGIN.replace(where, f"{where}    {code}\n")


FAULTS = {
    "initialize": (faulty(INITIALIZE, "raise OSError('no\\nMetal')"), "raises OSError: no Metal"),
    "start": (faulty(START, "raise RuntimeError('no queue')"), "raises RuntimeError: .*no queue"),
    "no device": (faulty(INITIALIZE, "return"), "finds no device"),
    "exit": (faulty(START, "print('lost\\n\\n', flush=True); os._exit(3)"), "ended with status 3 after 'lost'"),
    "wrong gradient": (
        faulty(START, "compute_instead(lax.scatter_add_p, lambda x, *_, **__: x)"),
        "computes wrong numbers: gradient of embedding differs by .* from the CPU's, 0.1 is allowed$",
    ),
    "import": (f"raise ImportError('no library')\n{PLUGIN}", "raises ImportError: no library"),
    "exit, 0": (faulty(START, "os._exit(0)"), "crashes: no answer"),
    "segmentation fault": (faulty(START, "os.kill(os.getpid(), signal.SIGSEGV)"), "crashes: .* by SIGSEGV"),
    "wrong logits": (
        faulty(
            START, "compute_instead(lax.dot_general_p, lambda x, y, **_: lax.full((2, 24, 257), 0.0), (2, 24, 257))"
        ),
        "computes wrong numbers: logits differs",
    ),
    "wrong loss": (
        faulty(START, "compute_instead(lax.max_p, lambda x, y: x)"),
        "computes wrong numbers: loss differs",
    ),
}


@pytest.fixture(autouse=True)
def isolate(tmp_path, monkeypatch):
    """Gives each test an empty cache, and restores the modules of the plugins that it disables."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "modules", sys.modules.copy())


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs a distribution, with a plugin if its name is given."""
    site = tmp_path / "site"
    monkeypatch.syspath_prepend(str(site))

    def install(name: str, version: str, plugin: str = "", source: str = PLUGIN) -> None:
        information = site / f"{name.replace('-', '_')}-{version}.dist-info"
        information.mkdir(parents=True)
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        if plugin:
            (information / "entry_points.txt").write_text(f"[jax_plugins]\n{plugin} = jax_plugins.{plugin}\n")
            (site / "jax_plugins" / plugin).mkdir(parents=True)
            (site / "jax_plugins" / plugin / "__init__.py").write_text(source)

    return install


PROGRAM = """
import sys
import jax
from jaxlm.device import backend, plugins
plugins.LIMIT = float(sys.argv[2])
device = backend.start(sys.argv[1])
print(device.client is not jax.devices("cpu")[0].client, jax.numpy.arange(3).sum())
"""


def start(platform: str, tmp_path: Path, limit: float = 600) -> tuple[str, str]:
    """Starts a platform in a new process; returns whether a plugin computed, and the process's stderr."""
    inherited = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    environment = inherited | {"PYTHONPATH": f"{tmp_path / 'site'}:{REPOSITORY}"}
    command = [sys.executable, "-c", PROGRAM, platform, str(limit)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout, done.stderr


def test_no_process_starts_without_a_plugin(monkeypatch, capsys):
    monkeypatch.setattr(plugins, "installed", list)
    monkeypatch.setattr(subprocess, "Popen", None)
    assert choose("auto") == choose("cpu") == ("cpu", "")
    assert capsys.readouterr() == ("", "")
    for platform in ("cuda", "mps", "metal"):
        with pytest.raises(UsageError, match=f"{platform} is not here"):
            choose(platform)


def test_entry_points_and_modules_are_plugins(install, tmp_path):
    install("jax-metal", "0.1.1", "metal_plugin")
    install("jax-cuda13-plugin", "0.11.2", "xla_cuda13")
    install("jax-graft", "1.0", "MTL")
    (tmp_path / "site" / "jax_plugins" / "iree_metal").mkdir()
    (tmp_path / "site" / "jax_plugins" / "iree_metal" / "__init__.py").touch()
    install("jax-mps", "0.10.11", "mps")
    install("another", "1.0", "abacus")
    assert [(plugin.module.removeprefix("jax_plugins."), plugin.platform, str(plugin)) for plugin in installed()] == [
        ("xla_cuda13", "cuda", "jax-cuda13-plugin 0.11.2"),
        ("mps", "mps", "jax-mps 0.10.11"),
        ("MTL", "metal", "jax-graft 1.0"),
        ("iree_metal", "metal", "the plugin jax_plugins.iree_metal"),
        ("metal_plugin", "metal", "jax-metal 0.1.1"),
        ("abacus", "", "another 1.0"),
    ]


@pytest.mark.parametrize(
    "fault", ["initialize", *(pytest.param(name, marks=pytest.mark.slow) for name in FAULTS if name != "initialize")]
)
def test_a_faulty_plugin_is_refused(install, fault):
    source, message = FAULTS[fault]
    install("jax-mps", VERSION, "mps", source)
    with pytest.raises(PluginError, match=message):
        verify(MPS)
    assert not list(plugins.user_cache.directory().iterdir())


@pytest.mark.parametrize(
    ("platforms", "exception", "answer"),
    [
        (["cpu"], None, ("", "finds no device")),
        (["cpu"], RuntimeError("no\nqueue"), ("", "raises RuntimeError: no queue")),
        (["mps", "cpu"], None, ("mps", "computes wrong numbers: loss differs by 0.5 from the CPU's, 0.1 is allowed")),
    ],
)
def test_the_probe_finds_the_platform_or_the_exception(monkeypatch, platforms, exception, answer):
    def backends():
        if exception:
            try:
                raise exception
            except RuntimeError:
                logging.getLogger("jax._src.xla_bridge").exception("jax only logs it")
        return platforms

    part = numerics.Part("loss", 0.5, 0.1)
    monkeypatch.setattr(probe_program, "backends", backends)
    monkeypatch.setattr(jax, "devices", lambda name: [name])
    monkeypatch.setattr(numerics, "check_small_model", lambda device: [part] if device == "mps" else [])
    assert probe_program._probe("jax_plugins.mps") == answer


@pytest.mark.parametrize(
    ("lines", "failure", "message"),
    [
        (["lost", "", ""], "ended with status 3", "ended with status 3 after 'lost'"),
        ([], "", "crashes: no answer"),
        (["[1]"], "", "crashes: no answer after '\\[1\\]'"),
        (["a"], "crashes: its process ended by SIGSEGV", "crashes: its process ended by SIGSEGV after 'a'"),
        (["", '{"name": "mps", "failure": "computes wrong numbers"}'], "", "computes wrong numbers"),
    ],
)
def test_a_failed_probe_says_what_happened(monkeypatch, lines, failure, message):
    monkeypatch.setattr(plugins, "run_isolated", lambda *_: (lines, failure))
    with pytest.raises(PluginError, match=f"^{message}$"):
        probe(MPS)


def test_a_hanging_plugin_is_left_out(install, monkeypatch, capsys):
    monkeypatch.setattr(plugins, "LIMIT", 0.5)
    install("jax-mps", VERSION, "mps", "import time; time.sleep(600)")
    assert choose("auto") == ("cpu", "")
    versions = f"jax-mps {VERSION} (with jax {JAX}, jaxlib {JAXLIB})"
    assert capsys.readouterr().err == f"Computing without {versions}, which hangs: no end after 0.5 s\n"
    assert sys.modules["jax_plugins.mps"].initialize() is None  # jax finds an empty module


@pytest.mark.slow
def test_the_cpu_computes_without_a_plugin_that_hangs(install, tmp_path):
    install("jax-mps", VERSION, "mps", faulty(INITIALIZE, "time.sleep(600)"))
    out, err = start("auto", tmp_path, limit=1)
    assert out == "False 3\n"
    assert err.endswith("which hangs: no end after 1 s\n")


def test_the_cpu_needs_no_plugin(install, monkeypatch):
    install("jax-mps", VERSION, "mps", "raise SystemExit")
    monkeypatch.setattr(subprocess, "Popen", None)
    assert choose("cpu") == ("cpu", "")
    assert sys.modules["jax_plugins.mps"].initialize() is None


@pytest.mark.slow
def test_the_cpu_starts_without_loading_a_plugin(install, tmp_path):
    install("jax-mps", VERSION, "mps", f"import os\nos._exit(1)\n{PLUGIN}")
    assert start("cpu", tmp_path) == ("False 3\n", "")


def test_a_plugin_is_probed_once_for_each_version(monkeypatch):
    probed = []
    monkeypatch.setattr(plugins, "probe", lambda plugin: probed.append(plugin) or "mps")
    newer = MPS._replace(version=f"{MINOR}.12")
    for plugin in (MPS, MPS, newer, newer, MPS):
        assert verify(plugin) == "mps"
    assert probed == [MPS, newer]
    assert verify(MPS, refresh=True) == "mps"
    assert probed == [MPS, newer, MPS]
    version_of = plugins.version_of
    monkeypatch.setattr(plugins, "version_of", lambda name: "2.0" if name == "jaxlm" else version_of(name))
    assert verify(MPS) == "mps"
    assert probed == [MPS, newer, MPS, MPS]


def test_the_first_plugin_that_passes_is_chosen_and_a_failure_is_not_cached(monkeypatch, capsys):
    cuda, mps, metal = (Plugin(f"jax_plugins.{name}", name, f"jax-{name}", "1") for name in ("cuda", "mps", "metal"))
    monkeypatch.setattr(plugins, "installed", lambda: [cuda, mps, metal])
    probed = []

    def probe(plugin):
        probed.append(plugin)
        if plugin == cuda:
            raise PluginError("finds no device")
        return plugin.platform.upper()

    monkeypatch.setattr(plugins, "probe", probe)
    monkeypatch.setattr(plugins, "check_versions", lambda plugin: None)
    for _ in range(2):
        assert choose("auto")[0] == "MPS"
        assert "Computing without jax-cuda 1" in capsys.readouterr().err
    assert choose("metal")[0] == "METAL"
    with pytest.raises(UsageError, match=rf"jax-cuda 1 \(with jax {JAX}, jaxlib {JAXLIB}\), which finds no device"):
        choose("cuda")
    assert probed == [cuda, mps, cuda, metal, cuda]


@pytest.fixture
def jax_platforms():
    """Restores jax's platforms; a test starts without any named."""
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", None)
    yield
    jax.config.update("jax_platforms", before)


def test_a_plugin_that_no_longer_starts_is_named(monkeypatch, capsys, jax_platforms):
    def devices(platform=None):
        if platform is None and "mps" in jax.config.jax_platforms:
            raise RuntimeError("no queue. And more\nlines")
        return cpus

    cpus = jax.devices("cpu")
    monkeypatch.setattr(jax, "local_devices", devices)
    monkeypatch.setattr(plugins, "choose", lambda platform: ("mps", "jax-mps 1"))
    assert backend.start("auto") == cpus[0]
    assert capsys.readouterr().err == "Computing without jax-mps 1, which no longer starts (no queue)\n"
    with pytest.raises(UsageError, match=r"^platform mps does not start \(no queue\)"):
        backend.start("mps")


@pytest.mark.parametrize("named", ["cuda", "cuda,cpu"])
def test_the_environment_gets_its_platform_or_an_error(jax_platforms, named):
    """jax passes over cuda, which has no GPU here."""
    jax.config.update("jax_platforms", named)
    if named == "cuda,cpu":
        assert backend.start("auto") == jax.devices("cpu")[0]
        return
    with pytest.raises(UsageError, match=r"^JAX_PLATFORMS=cuda does not start \(it finds no device\)") as caught:
        backend.start("auto")
    assert is_one_line(caught.value)
    assert str(caught.value).endswith("set the platform to cpu")  # by a flag that depends on the command
    assert backend.start("cpu") == jax.devices("cpu")[0]


def test_a_plugin_that_finds_no_device_any_more_is_named(monkeypatch, capsys, jax_platforms):
    monkeypatch.setattr(plugins, "choose", lambda platform: ("cuda", "jax-cuda 1"))
    assert backend.start("auto") == jax.devices("cpu")[0]
    assert capsys.readouterr().err == "Computing without jax-cuda 1, which no longer starts (it finds no device)\n"
    with pytest.raises(UsageError, match=r"^platform cuda does not start \(it finds no device\)"):
        backend.start("cuda")


@pytest.mark.slow
def test_a_plugin_that_passed_computes_until_it_no_longer_starts(install, tmp_path):
    broken, starts = tmp_path / "broken", tmp_path / "starts"
    code = (
        f"if os.path.exists({str(broken)!r}): raise RuntimeError('no queue')\n    open({str(starts)!r}, 'a').write('.')"
    )
    install("jax-mps", VERSION, "mps", faulty(START, code))
    assert start("auto", tmp_path) == ("True 3\n", "")
    assert starts.read_text() == ".."  # the probe, then the command
    broken.touch()
    out, err = start("auto", tmp_path)
    assert out == "False 3\n"
    assert f"Computing without jax-mps {VERSION} (with jax {JAX}, jaxlib {JAXLIB}), which no longer starts" in err
    assert "no queue" in err


METAL = Plugin("jax_plugins.metal_plugin", "metal", "jax-metal", "0.1.1")


def test_jax_metal_is_made_for_one_jax(install):
    install("jax", "0.4.34")
    install("jaxlib", "0.4.34")
    check_versions(METAL)


@pytest.mark.parametrize(("jax", "jaxlib"), [("0.4.33", "0.4.33"), ("0.10.2", "0.10.2"), ("0.4.34", "0.4.35")])
def test_jax_metal_is_refused_beside_any_other_jax(install, monkeypatch, jax, jaxlib):
    install("jax-metal", "0.1.1", "metal_plugin")
    install("jax", jax)
    install("jaxlib", jaxlib)
    monkeypatch.setattr(subprocess, "Popen", None)
    message = rf"^jax-metal 0\.1\.1 \(with jax {jax}, jaxlib {jaxlib}\), which .* jax==0\.4\.34 jaxlib==0\.4\.34"
    with pytest.raises(UsageError, match=message) as caught:
        choose("metal")
    assert is_one_line(caught.value)


@pytest.mark.parametrize(("version", "jaxlib"), [("0.10.11", "0.10.0"), ("0.10.11", "0.10.2"), ("0.11.1", "0.11.3")])
def test_jax_mps_is_made_for_one_minor_version_of_jaxlib(install, version, jaxlib):
    install("jaxlib", jaxlib)
    check_versions(MPS._replace(version=version))


@pytest.mark.parametrize(
    ("version", "jaxlib", "pins"),
    [
        ("0.10.11", "0.11.2", "jax-mps==0.11.1"),
        ("0.11.1", "0.10.2", "jax-mps==0.10.11"),
        ("0.11.1", "0.12.0", "jax-mps==0.11.1 'jax==0.11.*' 'jaxlib==0.11.*'"),
        ("0.10.11", "0.4.34", "jax-mps==0.10.11 'jax==0.10.*' 'jaxlib==0.10.*'"),
        ("0.1.1", "0.12.0", "jax-mps==0.11.1 'jax==0.11.*' 'jaxlib==0.11.*'"),
    ],
)
def test_jax_mps_is_refused_beside_any_other_jaxlib(install, monkeypatch, version, jaxlib, pins):
    install("jax-mps", version, "mps")
    install("jax", jaxlib)
    install("jaxlib", jaxlib)
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(UsageError) as caught:
        choose("mps")
    versions = f"jax-mps {version} (with jax {jaxlib}, jaxlib {jaxlib})"
    assert str(caught.value).startswith(
        f"{versions}, which is made for another jaxlib: pip install {pins}, or set the platform to auto"
    )
    assert is_one_line(caught.value)


@pytest.mark.parametrize(
    ("name", "version", "module", "platform", "pin"),
    [("jax-metal", "0.1.1", "metal_plugin", "METAL", "jax==0.4.34"), ("jax-mps", "0.1.1", "mps", "mps", "jax-mps==")],
)
def test_versions_are_checked_if_the_environment_names_the_platform(
    install, jax_platforms, name, version, module, platform, pin
):
    install(name, version, module)
    install("jax", "0.11.0")
    install("jaxlib", "0.11.0")
    jax.config.update("jax_platforms", platform)
    with pytest.raises(UsageError, match=rf"^{name} {version} \(with jax 0\.11\.0,.*JAX_PLATFORMS.* {pin}"):
        backend.start("auto")
