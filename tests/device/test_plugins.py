"""Plugins that do not do what they should, stood in for by small ones that are installed for a test alone.

Each registers a second CPU under the name mps, or fails to in its own way.
"""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxlm.device import backend, plugins
from jaxlm.device.plugins import Plugin, PluginError, check_versions, choose, installed
from jaxlm.errors import UsageError

REPOSITORY = Path(__file__).parents[2]

SOUND = """
import os, signal, time
from jax import lax
from jax._src.xla_bridge import make_cpu_client
from jax.extend.backend import register_backend_factory
from jax.interpreters import mlir


def compute_instead(primitive, function):
    lowering = mlir.lower_fun(function, multiple_results=False)
    mlir.register_lowering(primitive, lowering, platform="cpu")


def start():
    return make_cpu_client()


def initialize():
    register_backend_factory("mps", start, priority=500, fail_quietly=False)
"""
START, INITIALIZE = "    return make_cpu_client()", '    register_backend_factory("mps", start'
BEFORE_INITIALIZING = "def initialize():\n"
UNFIT = {
    "import": ("import os", "raise ImportError('no library')\nimport os", "ImportError: no library"),
    "initialize": (BEFORE_INITIALIZING, BEFORE_INITIALIZING + "    raise OSError('no\\nMetal')\n", "OSError: no Metal"),
    "start": (START, "    raise RuntimeError('no queue')", "RuntimeError: .*no queue"),
    "no device": (BEFORE_INITIALIZING, BEFORE_INITIALIZING + "    return\n", "finds no device"),
    "exit": (START, "    print('lost\\n\\n', flush=True); os._exit(3)", "which ended with status 3 after 'lost'"),
    "exit, 0": (START, "    os._exit(0)", "crashes: no answer"),
    "segmentation fault": (START, "    os.kill(os.getpid(), signal.SIGSEGV)", "crashes: .* by SIGSEGV"),
    "wrong logits": (START, f"    compute_instead(lax.rsqrt_p, lambda x, **_: 1.1 / lax.sqrt(x))\n{START}", "logits"),
    "wrong loss": (START, f"    compute_instead(lax.max_p, lambda x, y: x)\n{START}", "loss"),
    "wrong gradient": (
        START,
        f"    compute_instead(lax.scatter_add_p, lambda x, *_, **__: x)\n{START}",
        "computes wrong: the gradient of a small model's embedding",
    ),
}


@pytest.fixture(autouse=True)
def own_place(tmp_path, monkeypatch):
    """Nothing is remembered, and what is left out is so for one test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "modules", sys.modules.copy())


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Has a distribution be found, and its plugin if it is given one."""
    site = tmp_path / "site"
    monkeypatch.syspath_prepend(str(site))

    def install(name: str, version: str, plugin: str = "", source: str = SOUND) -> None:
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
    """What a command prints that starts on a platform, beside what is installed: on stdout and on stderr."""
    usual = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    environment = usual | {"PYTHONPATH": f"{tmp_path / 'site'}:{REPOSITORY}"}
    command = [sys.executable, "-c", PROGRAM, platform, str(limit)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout, done.stderr


def test_nothing_is_run_where_there_is_no_plugin(monkeypatch, capsys):
    monkeypatch.setattr(plugins, "installed", lambda: [])
    monkeypatch.setattr(subprocess, "Popen", None)
    assert choose("auto") == choose("cpu") == ("cpu", "")
    assert capsys.readouterr() == ("", "")
    for platform in ("cuda", "mps", "metal"):
        with pytest.raises(UsageError, match=f"{platform} is not here"):
            choose(platform)


def test_plugins_are_found_by_their_entry_points_and_by_their_modules(install, tmp_path):
    install("jax-metal", "0.1.1", "metal_plugin")
    install("jax-cuda13-plugin", "0.11.2", "xla_cuda13")
    install("jax-graft", "1.0", "MTL")
    (tmp_path / "site" / "jax_plugins" / "iree_metal").mkdir()
    (tmp_path / "site" / "jax_plugins" / "iree_metal" / "__init__.py").touch()
    install("jax-mps", "0.10.11", "mps")
    install("another", "1.0", "abacus")
    found = [(plugin.module.removeprefix("jax_plugins."), plugin.platform, str(plugin)) for plugin in installed()]
    assert found == [
        ("xla_cuda13", "cuda", "jax-cuda13-plugin 0.11.2"),
        ("mps", "mps", "jax-mps 0.10.11"),
        ("MTL", "metal", "jax-graft 1.0"),
        ("iree_metal", "metal", "the plugin jax_plugins.iree_metal"),
        ("metal_plugin", "metal", "jax-metal 0.1.1"),
        ("abacus", "", "another 1.0"),
    ]


@pytest.mark.parametrize("way", UNFIT)
def test_an_unfit_plugin_is_named_with_the_versions_and_what_it_did(install, way):
    sound, instead, what = UNFIT[way]
    assert SOUND.count(sound) == 1
    install("jax-mps", "0.10.11", "mps", SOUND.replace(sound, instead))
    version = plugins.version_of("jax")
    with pytest.raises(UsageError, match=rf"jax-mps 0\.10\.11 \(with jax {version}, jaxlib {version}\).*{what}"):
        choose("mps")


def test_a_plugin_that_hangs_is_left_out_and_the_cpu_computes(install, tmp_path):
    install(
        "jax-mps", "0.10.11", "mps", SOUND.replace(BEFORE_INITIALIZING, f"{BEFORE_INITIALIZING}    time.sleep(600)\n")
    )
    out, err = start("auto", tmp_path, limit=3)
    assert out == "False 3\n"
    assert err.count("\n") == 1
    assert "Computing without jax-mps 0.10.11" in err
    assert "hangs" in err


def test_the_cpu_is_had_without_a_look_at_the_plugins(install, tmp_path):
    install("jax-mps", "0.10.11", "mps", SOUND.replace("import os", "import os\nos._exit(1)\nimport os"))
    assert start("cpu", tmp_path) == ("False 3\n", "")


def test_a_fit_plugin_is_tried_once_for_each_version_of_it(install, tmp_path):
    noting = f"    open({str(tmp_path / 'starts')!r}, 'a').write('.')\n"
    install("jax-mps", "0.10.11", "mps", SOUND.replace(BEFORE_INITIALIZING, BEFORE_INITIALIZING + noting))
    for platform, starts in (("auto", 2), ("auto", 3), ("mps", 4)):  # the first time the trial's and the command's own
        assert start(platform, tmp_path) == ("True 3\n", "")
        assert (tmp_path / "starts").read_text() == "." * starts
    (information,) = (tmp_path / "site").glob("*.dist-info")
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: jax-mps\nVersion: 0.10.12\n")
    assert start("auto", tmp_path) == ("True 3\n", "")
    assert (tmp_path / "starts").read_text() == "." * 6


def test_the_first_fit_plugin_is_taken_and_unfit_ones_are_tried_anew(monkeypatch, capsys):
    cuda, mps, metal = (Plugin(f"jax_plugins.{name}", name, f"jax-{name}", "1") for name in ("cuda", "mps", "metal"))
    monkeypatch.setattr(plugins, "installed", lambda: [cuda, mps, metal])
    tried = []

    def probe(plugin):
        tried.append(plugin)
        if plugin == cuda:
            raise PluginError("finds no device")
        return plugin.platform.upper()

    monkeypatch.setattr(plugins, "probe", probe)
    monkeypatch.setattr(plugins, "check_versions", lambda plugin: None)
    for _ in range(2):
        assert choose("auto")[0] == "MPS"
        assert "Computing without jax-cuda 1" in capsys.readouterr().err
    assert choose("metal")[0] == "METAL"
    with pytest.raises(UsageError, match=r"jax-cuda 1 .* finds no device"):
        choose("cuda")
    assert tried == [cuda, mps, cuda, metal, cuda]


def test_jax_metal_may_try_what_it_is_made_for(install):
    install("jax", "0.4.34")
    install("jaxlib", "0.4.34")
    assert check_versions(Plugin("jax_plugins.metal_plugin", "metal", "jax-metal", "0.1.1")) is None


OTHERS = ["0.4.33", "0.4.35", "0.5.0", "0.10.2", "1.0"]


@pytest.mark.parametrize(("jax", "jaxlib"), [*zip(OTHERS, OTHERS, strict=True), ("0.4.34", "0.4.35")])
def test_jax_metal_is_refused_beside_any_other_jax(install, monkeypatch, jax, jaxlib):
    install("jax-metal", "0.1.1", "metal_plugin")
    install("jax", jax)
    install("jaxlib", jaxlib)
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(
        UsageError, match=rf"jax-metal 0\.1\.1 \(with jax {jax}, jaxlib {jaxlib}\).* jax==0\.4\.34"
    ) as caught:
        choose("metal")
    assert len(str(caught.value).splitlines()) == 1


def test_jax_metal_is_refused_where_the_environment_names_its_platform_too(install, monkeypatch):
    install("jax-metal", "0.1.1", "metal_plugin")
    install("jax", "0.10.2")
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", "METAL")
    try:
        with pytest.raises(UsageError, match=r"jax-metal 0\.1\.1 \(with jax 0\.10\.2,.*JAX_PLATFORMS.* jax==0\.4\.34"):
            backend.start("auto")
    finally:
        jax.config.update("jax_platforms", before)


def test_a_plugin_that_was_fit_and_does_not_start_is_named_with_the_versions(install, tmp_path):
    broken = tmp_path / "broken"
    failing = f"    if os.path.exists({str(broken)!r}):\n        raise RuntimeError('no queue')\n{START}"
    install("jax-mps", "0.10.11", "mps", SOUND.replace(START, failing))
    assert start("auto", tmp_path) == ("True 3\n", "")
    broken.touch()
    out, err = start("auto", tmp_path)
    assert out == "False 3\n"
    version = plugins.version_of("jax")
    assert f"Computing without jax-mps 0.10.11 (with jax {version}, jaxlib {version}), which does not start" in err
    assert "no queue" in err
