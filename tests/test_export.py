"""The command that exports a model."""

import hashlib
import json
import os
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxlm.errors import RunError, UsageError
from jaxlm.export import main
from jaxlm.interop.huggingface import read_params
from jaxlm.sample import main as sample
from tests import tiny_run
from tests.tiny_run import config_of, disk_room, is_one_line, listing, rows

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    with tiny_run.workplace(tmp_path_factory, trained=True) as place:
        yield place


def export(*flags, workdir="run"):
    main(["--workdir", workdir, *map(str, flags)])


def test_the_exported_folder_is_the_runs_final_model(tmp_path, capsys):
    export("--out", tmp_path / "deep" / "model")
    assert capsys.readouterr().out == f"{tmp_path / 'deep' / 'model'} holds the model of step 12\n"
    written = {path.name: path.read_bytes() for path in (tmp_path / "deep" / "model").iterdir()}
    assert written == {path.name: path.read_bytes() for path in Path("run/final_model").iterdir()}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["model"]


def test_a_step_selects_its_checkpoint(tmp_path):
    export("--out", tmp_path / "model", "--step", 6)
    saved = tiny_run.saved_state("run", 6).params
    tiny_run.assert_same_bits(read_params(tmp_path / "model", config_of("run").model), saved)


def test_the_card_describes_the_training(tmp_path):
    export("--out", tmp_path / "model", "--step", 9)
    card = (tmp_path / "model" / "README.md").read_text()
    table = dict(re.findall(r"(?m)^\| ([^|]+) \| ([^|]+) \|$", card))
    recorded = {row["step"]: row for row in rows("run/metrics.jsonl")}
    bits = recorded[8]["val_bits_per_byte"]
    meta = json.loads(Path("tokens/meta.json").read_text())
    train, val = meta["train"]["sha256"], meta["val"]["sha256"]
    sha256 = hashlib.sha256(Path("text.txt").read_bytes()).hexdigest()
    assert table == {
        "sizes": "2 layers, 2 heads, width 16, MLP width 24, context 16, vocabulary 300 (GPT-2's)",
        "initialised from": "random weights, seed 0",
        "text": f"text.txt (sha256 {sha256}, tokenizer gpt2, train_sha256 {train}, val_sha256 {val})",
        "trained": "9 of 12 steps, 576 tokens",
        "training loss": f"{recorded[9]['loss']:.4f} nats per token (step 9)",
        "validation loss": f"{recorded[8]['val_loss']:.4f} nats per token, {bits:.4f} bits per byte (step 8)",
    }
    parameters = sum(leaf.size for leaf in jax.tree.leaves(tiny_run.saved_state("run", 9).params))
    assert f"# A language model of {parameters:,} parameters\n" in card
    settings = json.loads(re.search("```json\n(.*?)```", card, re.DOTALL)[1])
    assert settings["max_steps"] == 12
    assert "save_interval" not in settings
    assert card.startswith("---\n")


@pytest.mark.parametrize("form", ["hf", "gguf", "html"])
def test_an_export_is_replaced_only_with_overwrite(tmp_path, form):
    out = tmp_path / {"hf": "model", "gguf": "model.gguf", "html": "model.html"}[form]
    export("--format", form, "--out", out, "--step", 3)
    before = listing(tmp_path)
    with pytest.raises(UsageError, match="--overwrite") as caught:
        export("--format", form, "--out", out)
    assert is_one_line(caught.value)
    assert listing(tmp_path) == before
    export("--format", form, "--out", out, "--overwrite")
    assert listing(tmp_path).keys() == before.keys()
    assert listing(tmp_path) != before


@pytest.mark.parametrize("form", ["hf", "gguf", "html"])
def test_other_files_are_never_overwritten(tmp_path, form):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / f"of.{form}").mkdir()
    (tmp_path / "file").write_text("mine")
    before = listing(tmp_path)
    places = {"hf": ("letters", "file")}.get(form, (f"letters/of.{form}", "file"))
    for name in places:
        with pytest.raises((UsageError, RunError)) as caught:
            export("--format", form, "--out", tmp_path / name, "--overwrite")
        assert is_one_line(caught.value)
    assert listing(tmp_path) == before


def strangers_model(place):
    """A folder with a model of another program and a thesis, and a GGUF file."""
    place.mkdir()
    (place / "thesis.txt").write_text("mine")
    weights = load_file("run/final_model/model.safetensors")
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    writer = gguf.GGUFWriter(place / "model.gguf", "llama")
    writer.add_tensor("norm", np.ones(4, np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    (place / "text.gguf").write_text("mine")
    (place / "text.html").write_text("<!-- written by me -->\n")


STRANGERS = [("hf", "m"), ("gguf", "m/model.gguf"), ("gguf", "m/text.gguf"), ("html", "m/text.html")]


@pytest.mark.parametrize(("form", "name"), STRANGERS)
def test_a_strangers_model_is_never_overwritten(tmp_path, form, name):
    strangers_model(tmp_path / "m")
    before = listing(tmp_path)
    for flags in ([], ["--overwrite"]):
        with pytest.raises(UsageError, match="move it away") as caught:
            export("--format", form, "--out", tmp_path / name, *flags)
        assert is_one_line(caught.value)
    assert listing(tmp_path) == before


def test_an_export_that_a_person_quantized_or_trained_further_is_theirs(tmp_path):
    """They keep the metadata and change the tensors."""
    export("--format", "gguf", "--out", tmp_path / "model.gguf")
    content = bytearray((tmp_path / "model.gguf").read_bytes())
    content[-1] ^= 1
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(UsageError, match="move it away"):
        export("--format", "gguf", "--out", tmp_path / "model.gguf", "--overwrite")


def test_overwriting_keeps_what_else_is_in_the_folder(tmp_path):
    export("--out", tmp_path / "model", "--step", 3)
    (tmp_path / "model" / "x.gguf").write_text("mine")
    (tmp_path / "model.tmp").mkdir()
    (tmp_path / "model.tmp" / "letter").write_text("mine")
    export("--out", tmp_path / "model", "--overwrite")
    expected = listing(Path("run/final_model")) | {"run/final_model/x.gguf": b"mine"}
    assert listing(tmp_path / "model") == {
        path.replace("run/final_model", f"{tmp_path}/model"): data for path, data in expected.items()
    }
    assert (tmp_path / "model.tmp" / "letter").read_text() == "mine"


def test_a_killed_export_is_completed_by_the_same_command(tmp_path, monkeypatch):
    """Whether it ended before or after the first rename."""
    for renames in (0, 1, 5):
        out, done, replace = tmp_path / f"{renames}", [], Path.replace

        def replace_or_die(self, target, done=done, renames=renames, replace=replace):
            if len(done) == renames:
                raise KeyboardInterrupt
            done.append(target)
            return replace(self, target)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "replace", replace_or_die)
            patch.setattr(Path, "unlink", lambda self, **flags: None)
            with pytest.raises(KeyboardInterrupt):
                export("--out", out)
        assert len(os.listdir(out)) == 8
        export("--out", out)
        assert sorted(os.listdir(out)) == sorted(os.listdir("run/final_model"))
        with pytest.raises(UsageError, match="--overwrite"):
            export("--out", out)


def test_an_empty_folder_is_used(tmp_path, monkeypatch):
    run = Path("run").absolute()
    export("--out", tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    export("--out", ".", workdir=str(run))
    assert (tmp_path / "here" / "model.safetensors").exists()


def test_a_gguf_file_is_written_to_the_file_or_folder_of_out(tmp_path):
    """A file that is named so needs no --format."""
    export("--out", tmp_path / "new" / "mine.gguf")
    export("--format", "gguf", "--out", tmp_path, "--dtype", "q8_0")
    export("--format", "gguf", "--out", tmp_path)
    names = {"new/mine.gguf", "model-q8_0.gguf", "model-f16.gguf"}
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.gguf")} == names
    export("--out", tmp_path / "MINE.GGUF")
    assert (tmp_path / "MINE.GGUF").is_file()
    first, second = (gguf.GGUFReader(tmp_path / name) for name in ("new/mine.gguf", "model-f16.gguf"))
    assert first.get_field("jaxlm.sha256").contents() == second.get_field("jaxlm.sha256").contents()
    assert second.get_field("general.name").contents() == "model-f16"


def test_the_modelfile_is_what_ollama_reads(tmp_path):
    """By the grammar and the parameters of https://docs.ollama.com/modelfile."""
    export("--out", tmp_path / "a b.gguf")
    lines = (tmp_path / "a b.Modelfile").read_text().splitlines()
    assert lines[0] == "# ollama create 'a b' -f 'a b.Modelfile'"
    instructions = [line.split(" ", 1) for line in lines if not line.startswith("#")]
    parameters = dict(value.split(" ") for name, value in instructions if name == "PARAMETER")
    assert [pair for pair in instructions if pair[0] != "PARAMETER"] == [
        ["FROM", "./a b.gguf"],
        ["TEMPLATE", '"""{{ .Prompt }}"""'],
    ]
    integers, floats = {"num_ctx", "num_predict", "top_k"}, {"temperature", "top_p", "repeat_penalty"}
    assert parameters.keys() == integers | floats
    assert all(int(parameters[name]) >= 0 for name in integers)
    assert all(float(parameters[name]) > 0 for name in floats)
    assert parameters["num_ctx"] == "16"  # the model's context


def test_a_modelfile_of_a_person_stays(tmp_path, capsys):
    file = tmp_path / "model.Modelfile"
    export("--out", tmp_path / "model.gguf")
    written = file.read_text()
    assert capsys.readouterr().out.startswith(f"{file} is for ollama\n")
    for text, flags in ((f"{written}# mine\n", ["--overwrite"]), (written.replace("FROM", "from"), ["--overwrite"])):
        file.write_text(text)
        export("--out", tmp_path / "model.gguf", *flags)
        assert file.read_text() == text
        assert capsys.readouterr().out.startswith(f"{file} stays as it was\n")


def test_a_modelfile_of_an_earlier_export_is_replaced_with_overwrite(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxlm.interop.ollama.TOKENS", 300)
    export("--out", tmp_path / "model.gguf")
    monkeypatch.undo()
    earlier = (tmp_path / "model.Modelfile").read_bytes()
    (tmp_path / "model.gguf").unlink()
    for flags, same in (([], True), (["--overwrite"], False)):
        export("--out", tmp_path / "model.gguf", *flags)
        assert ((tmp_path / "model.Modelfile").read_bytes() == earlier) == same


def test_a_page_is_written_to_the_file_or_folder_of_out(tmp_path, capsys):
    export("--out", tmp_path / "new" / "mine.html", "--step", 6)
    assert capsys.readouterr().out == f"{tmp_path / 'new' / 'mine.html'} holds the model of step 6\n"
    page = (tmp_path / "new" / "mine.html").read_text()
    assert "<h1>mine</h1>" in page
    assert "trained on text.txt." in page
    export("--format", "html", "--out", tmp_path, "--dtype", "q8_0")
    assert "<h1>model-q8_0</h1>" in (tmp_path / "model-q8_0.html").read_text()


@pytest.mark.parametrize("form", ["hf", "gguf", "html"])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, form):
    with disk_room(5_000), pytest.raises(RunError, match="larger files") as caught:
        export("--format", form, "--out", tmp_path / "out.gguf")
    assert is_one_line(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--out", "new", "--step", "5"], "3, 6, 9, 12"),
        (["--out", "new", "--dtype", "f16"], "--dtype"),
        (["--out", "new", "--format", "onnx"], "onnx"),
        (["--out", "new.zip"], "new.zip is no *.gguf or *.html: name one, or add --format hf"),
        (["--out", "new", "--format", "gguf", "--dtype", "q4_0"], "q4_0"),
        ([], "--out"),
        (["--out", "new", "--workdir", "tokens"], "tokens"),
    ],
)
def test_a_wrong_request_is_refused_in_one_line(flags, named):
    before = set(os.listdir())
    with pytest.raises(UsageError, match=re.escape(named)) as caught:
        export(*flags)
    assert is_one_line(caught.value)
    assert set(os.listdir()) == before


def test_without_its_package_gguf_is_refused_first(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UsageError, match="pip install"):
        export("--format", "gguf", "--out", tmp_path / "out")


@pytest.mark.slow
def test_a_run_with_kv_heads_and_an_untied_head_is_exported_and_imported(tmp_path, capsys):
    shape = ("--config.model.kv_heads=1", "--config.model.tied=False")
    tiny_run.train("other", *shape, "--config.optimizer.name=muon", "--config.max_steps=3")
    export("--out", tmp_path / "model", workdir="other")
    begin = f"--config.init_from={tmp_path / 'model'}"
    tiny_run.train("further", *shape, begin, "--config.max_steps=3", "--config.optimizer.learning_rate=1e-9")
    texts = []
    for place in (["--workdir", "further"], ["--model", str(tmp_path / "model")]):
        capsys.readouterr()
        sample([*place, "--prompt", "Once", "--temperature", "0", "--tokens", "9"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
