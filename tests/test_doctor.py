"""The report of a machine: a part that fails is in it, and so are the others."""

import pytest

from jaxlm import doctor
from jaxlm.device import plugins
from jaxlm.device.plugins import Plugin, PluginError
from jaxlm.doctor import main, told, write_report
from jaxlm.errors import UsageError

MPS = Plugin("jax_plugins.mps", "mps", "jax-mps", "0.10.11")
METAL = Plugin("jax_plugins.metal_plugin", "metal", "jax-metal", "0.1.1")


@pytest.fixture
def machine(monkeypatch):
    """One with two plugins, of which those in the set are fit; gives what the parts ran."""
    fit, ran = {METAL}, []

    def try_out(plugin, anew):
        if not anew or plugin not in fit:
            raise PluginError("raises OSError: no Metal")
        return plugin.platform.upper()

    monkeypatch.setattr(plugins, "installed", lambda: [MPS, METAL])
    monkeypatch.setattr(plugins, "try_out", try_out)
    monkeypatch.setattr(
        doctor, "run_isolated", lambda words, limit: (ran.append(words), (["line of a part"], "crashes"))[1]
    )
    return fit, ran


def test_each_part_is_reported_and_the_fit_plugin_is_the_one_looked_at(machine, tmp_path):
    out = tmp_path / "report.txt"
    main(["--out", str(out), "--config.batch_size=16"])
    report = out.read_text()
    for line in ("jax-mps 0.10.11", "UNFIT: raises OSError: no Metal", "METAL", "FAILED, crashes", "line of a part"):
        assert line in report
    for name in ("jaxlm", "jax"):
        assert f"\n{name} {plugins.version_of(name) or 'is not installed'}\n" in report
    soundness, plan = machine[1]
    assert soundness[:3] == ["-m", "jaxlm.plan", "--check"]
    assert plan[:2] == ["-m", "jaxlm.plan"]
    for words in (soundness, plan):
        assert {"--config.batch_size=16", "--config.platform=metal"} <= set(words)
        assert "--config=m2_60m" in words


def test_without_a_fit_plugin_the_plan_is_the_cpus(machine, tmp_path):
    machine[0].clear()
    main(["--out", str(tmp_path / "report.txt")])
    (plan,) = machine[1]
    assert plan[:2] == ["-m", "jaxlm.plan"]
    assert "--config.platform=cpu" in plan


def test_a_report_is_whole_after_each_part(tmp_path):
    def stop():
        assert "what it says" in (tmp_path / "report.txt").read_text()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_report(tmp_path / "report.txt", iter([("First", lambda: "what it says"), ("Second", stop)]))
    assert [path.name for path in tmp_path.iterdir()] == ["report.txt"]


def test_a_file_that_is_there_or_cannot_be_is_refused(machine, tmp_path):
    (tmp_path / "report.txt").write_text("another")
    for place in ("report.txt", "missing/report.txt"):
        with pytest.raises(UsageError, match="--out"):
            main(["--out", str(tmp_path / place)])
    assert (tmp_path / "report.txt").read_text() == "another"
    assert not machine[1]


def test_what_a_failing_process_said_last_is_told():
    text = told(["-c", "print(*range(1000), sep='\\n', flush=True); raise OSError('no device')"])
    assert text.startswith("FAILED, ended with status 1\n")
    assert text.endswith("OSError: no device")
    assert "\n999\n" in text
    assert "\n9\n" not in text
    assert told(["-c", "print('fine')"]) == "fine"
