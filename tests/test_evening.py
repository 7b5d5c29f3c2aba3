"""An evening with one's own text: the README's commands, on a made-up folder, in small sizes."""

import re
import shlex
import shutil
from importlib import import_module
from pathlib import Path

import pytest

from jaxlm.cli import PRESETS
from jaxlm.planner import sizes
from jaxlm.planner.measure import BenchmarkResult
from tests.tiny_run import assert_same_bits, config_of, is_one_line, rows, saved_state, workplace, write_text

README = Path(__file__).parents[1] / "README.md"
LADDER = sizes.LADDER
SMALL = ["--config.model.vocab_size=300", "--config.max_steps=6", "--config.eval_interval=2"]
SMALL += ["--config.save_interval=3", "--config.optimizer.warmup_steps=2", "--config.sample.tokens=5"]

pytestmark = pytest.mark.slow


def run(command: str, *more: str) -> None:
    python, m, module, *words = shlex.split(command)
    assert [python, m] == ["python", "-m"]
    import_module(module).main([*words, *more])


def make_folder(folder: Path) -> None:
    folder.mkdir()
    for seed, name in enumerate(("a day in May.txt", "winter.MD", "notes 3.TXT")):
        write_text(folder / name, seed=seed)
    text = 50 * "The old man went home to the café and saw the king. "
    (folder / "from windows.txt").write_text(text, encoding="cp1252")
    (folder / "empty day.txt").touch()
    (folder / ".hidden.txt").write_text("nothing to see")
    (folder / "photo.jpg").write_bytes(b"\xff\xd8")


def test_three_commands_train_on_a_folder_write_and_make_a_file_to_send(tmp_path_factory, monkeypatch, capsys):
    benchmark = BenchmarkResult(*[1] * 3, *[0.1] * 11, *[1] * 4)
    monkeypatch.setattr(sizes, "cached_benchmark", lambda config, device: benchmark)
    monkeypatch.setattr(sizes, "store_benchmark", lambda *arguments: None)
    monkeypatch.setattr(sizes, "LADDER", LADDER[:1])
    section = README.read_text().partition("## Your own text")[2]
    training, writing, sending = re.search(r"```sh\n(.*?)\n```", section, re.DOTALL)[1].splitlines()
    with workplace(tmp_path_factory):
        Path("configs").symlink_to(PRESETS)
        make_folder(Path("letters"))
        run(training, *SMALL)
        console = capsys.readouterr().out
        assert "1 hidden (letters/.hidden.txt), 1 empty ('letters/empty day.txt'), 1 of another kind" in console
        assert "Not UTF-8, so read as Windows-1252: 'letters/from windows.txt'" in console
        assert re.search(r"Done: 6 steps, the model.* is in runs/mine/final_model", console)
        assert config_of("runs/mine").model.width == sizes.LADDER[0].width
        assert [row["step"] for row in rows("runs/mine/metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
        texts = [
            file.read_text("cp1252" if "windows" in file.name else "utf-8")
            for file in Path("letters").glob("*.*")
            if file.suffix != ".jpg"
        ]
        text = " ".join(" ".join(texts).split())
        assert all(row["prompt"] in text for row in rows("runs/mine/samples.jsonl"))

        run(writing, "--tokens", "20")
        assert capsys.readouterr().out.startswith("Dear")

        run(sending)
        sent = Path(re.search(r"--out (\S+)", sending)[1])
        assert sent.stat().st_size > 100_000
        assert str(Path.home()) not in sent.read_text()
        with pytest.raises(Exception, match="--overwrite") as caught:
            run(sending)
        assert is_one_line(caught.value)

        write_text(Path("letters/another day.txt"), seed=9)
        capsys.readouterr()
        whole = saved_state("runs/mine", 6)
        shutil.rmtree("runs/mine/checkpoints/6")
        with monkeypatch.context() as patch:
            patch.setattr(sizes, "LADDER", LADDER[1:])  # what would be chosen now
            run(training, *SMALL)
        console = capsys.readouterr().out
        assert "Resuming from step 3" in console
        assert_same_bits(saved_state("runs/mine", 6), whole)
        assert "letters has changed: the run resumes with the tokens that it began with" in console
        assert config_of("runs/mine").model.width == LADDER[0].width
        command = re.search(r"To train its model on the new text: (.*)", console)[1]
        run(command)
        assert "Done: 6 steps" in capsys.readouterr().out
        assert Path(config_of("runs/mine-2").init_from).samefile("runs/mine/final_model")
