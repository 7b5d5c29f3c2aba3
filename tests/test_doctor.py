"""The doctor's report: it has all parts, even if one fails."""

import pytest

from jaxlm import doctor
from jaxlm.device import plugins
from jaxlm.device.plugins import Plugin, PluginError
from jaxlm.doctor import main, run_part, write_report
from jaxlm.errors import UsageError

MPS = Plugin("jax_plugins.mps", "mps", "jax-mps", "0.10.11")
METAL = Plugin("jax_plugins.metal_plugin", "metal", "jax-metal", "0.1.1")


@pytest.fixture
def machine(monkeypatch):
    """A machine with two plugins; returns the set of those that pass, and a list of what the parts run."""
    usable, commands = {METAL}, []

    def verify(plugin, refresh):
        if not refresh or plugin not in usable:
            raise PluginError("raises OSError: no Metal")
        return plugin.platform.upper()

    def run_isolated(arguments, limit):
        commands.append(arguments)
        return ["line of a part"], "crashes"

    monkeypatch.setattr(plugins, "installed", lambda: [MPS, METAL])
    monkeypatch.setattr(plugins, "verify", verify)
    monkeypatch.setattr(doctor, "run_isolated", run_isolated)
    return usable, commands


def test_each_part_is_reported_for_the_plugin_that_passes(machine, tmp_path):
    out = tmp_path / "report.txt"
    main(["--out", str(out), "--config.batch_size=16"])
    report = out.read_text()
    for line in ("jax-mps 0.10.11", "FAILED: raises OSError: no Metal", "METAL", "FAILED, crashes", "line of a part"):
        assert line in report
    for name in ("jaxlm", "jax"):
        assert f"\n{name} {plugins.version_of(name) or 'is not installed'}\n" in report
    check, plan = machine[1]
    assert check[:3] == ["-m", "jaxlm.plan", "--check"]
    assert plan[:2] == ["-m", "jaxlm.plan"]
    for arguments in (check, plan):
        assert {"--config.batch_size=16", "--config.platform=metal"} <= set(arguments)
        assert "--config=m2_60m" in arguments


def test_without_a_usable_plugin_the_plan_is_for_the_cpu(machine, tmp_path):
    machine[0].clear()
    main(["--out", str(tmp_path / "report.txt")])
    (plan,) = machine[1]
    assert plan[:2] == ["-m", "jaxlm.plan"]
    assert "--config.platform=cpu" in plan


def test_the_report_is_written_after_each_part(tmp_path):
    def stop():
        assert "what it says" in (tmp_path / "report.txt").read_text()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_report(tmp_path / "report.txt", iter([("First", lambda: "what it says"), ("Second", stop)]))
    assert [path.name for path in tmp_path.iterdir()] == ["report.txt"]


def test_a_file_that_exists_or_cannot_be_written_is_refused(machine, tmp_path):
    (tmp_path / "report.txt").write_text("another")
    for place in ("report.txt", "missing/report.txt"):
        with pytest.raises(UsageError, match="--out"):
            main(["--out", str(tmp_path / place)])
    assert (tmp_path / "report.txt").read_text() == "another"
    assert not machine[1]


def test_a_part_that_fails_reports_its_last_lines():
    text = run_part(["-c", "print(*range(1000), sep='\\n', flush=True); raise OSError('no device')"])
    assert text.startswith("FAILED, ended with status 1\n")
    assert text.endswith("OSError: no device")
    assert "\n999\n" in text
    assert "\n9\n" not in text
    assert run_part(["-c", "print('fine')"]) == "fine"
