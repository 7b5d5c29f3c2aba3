"""Runs with an own vocabulary: it is kept with the tokens, in checkpoints and in exports, and none takes another's."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers

from experiments.interop import odd_texts
from jaxlm import plan
from jaxlm.cli import read_config
from jaxlm.data.token_files import open_tokens
from jaxlm.data.tokenizer import Tokenizer, load_tokenizer
from jaxlm.errors import UsageError
from jaxlm.export import main as export
from jaxlm.interop.huggingface import ForeignTokenizer, check_init, read_tokenizer
from jaxlm.main import main, open_data
from jaxlm.prepare import main as prepare
from jaxlm.run.load import restore
from jaxlm.sample import main as sample
from tests import tiny_run
from tests.test_plan import MEMORY, replace_memory
from tests.tiny_run import is_one_line, rows, train

TOKENS = Path("data/text-txt-own-300")
VOCABULARY = TOKENS / "tokenizer.tiktoken"
OWN = ["--config.data.tokenizer=own", "--config.data.dir="]


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    with tiny_run.workplace(tmp_path_factory, trained=True) as place:
        train("own", *OWN, share="plain")
        shutil.copytree("data", "kept")
        yield place


@pytest.fixture(autouse=True)
def data(place):
    """Each test begins with the files that were prepared."""
    shutil.rmtree("data", ignore_errors=True)
    shutil.copytree("kept", "data")


@pytest.fixture
def own():
    return open_tokens(TOKENS, 300, 16, "own").tokenizer


def refused(*flags, workdir="own", config="tiny.py"):
    with pytest.raises(UsageError) as caught:
        main(["--config", config, "--workdir", workdir, *flags])
    assert is_one_line(caught.value)
    return str(caught.value)


def answer(capsys, *flags):
    sample(["--prompt", "The king", "--tokens", "12", "--seed", "3", *flags])
    return capsys.readouterr().out


def test_the_files_beside_the_tokens(own):
    assert sorted(path.name for path in TOKENS.iterdir()) == ["meta.json", "tokenizer.tiktoken", "train.bin", "val.bin"]
    meta = json.loads((TOKENS / "meta.json").read_text())
    assert (meta["tokenizer"], meta["vocab_size"]) == ("own", 300)
    assert meta["tokenizer_sha256"] == hashlib.sha256(VOCABULARY.read_bytes()).hexdigest()
    assert (own.vocab_size, own.end_of_text) == (300, 299)
    assert own.vocabulary[256:] != load_tokenizer(300).vocabulary[256:]


@pytest.mark.slow
def test_a_run_without_its_tokens_is_sampled_and_exported(own, capsys, tmp_path):
    texts = {answer(capsys, "--workdir", "own"), answer(capsys, "--model", "own/final_model")}
    shutil.rmtree("data")
    texts.add(answer(capsys, "--workdir", "own"))
    assert len(texts) == 1
    export(["--workdir", "own", "--out", str(tmp_path / "model")])
    written = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    assert written == {path.name: path.read_bytes() for path in Path("own/final_model").iterdir()}
    assert b"vocabulary 300 (learnt from the text)" in written["README.md"]
    export(["--workdir", "own", "--out", str(tmp_path / "model.gguf"), "--format", "gguf"])
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "model.gguf").fields.items()}
    assert fields["tokenizer.ggml.tokens"] == own.names()
    assert fields["tokenizer.ggml.merges"] == own.merges() == written["merges.txt"].decode().splitlines()[1:]
    assert fields["tokenizer.ggml.token_type"] == [1] * 299 + [3]
    assert json.loads(written["vocab.json"]) == {name: i for i, name in enumerate(own.names())}


def test_the_exported_tokenizer_gives_the_ids_of_jaxlm(own):
    theirs = tokenizers.Tokenizer.from_file("own/final_model/tokenizer.json")
    for text in (Path("text.txt").read_text(), *odd_texts()):
        assert theirs.encode(text, add_special_tokens=False).ids == own.encode(text).tolist()


def test_an_exported_own_vocabulary_is_imported_as_itself(own):
    imported = read_tokenizer(Path("own/final_model"), 300)
    assert isinstance(imported, Tokenizer)
    assert imported.vocabulary == own.vocabulary


def swap_merges(content):
    merges = content["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]


@pytest.mark.parametrize(
    "change",
    [
        swap_merges,
        lambda content: content["model"]["merges"].pop(),
        lambda content: content["model"].update(ignore_merges=True),
        lambda content: content["model"].update(dropout=0.1),
        lambda content: content["added_tokens"].append(content["added_tokens"][0] | {"id": 5, "content": "&"}),
        lambda content: content.update(normalizer={"type": "Lowercase"}),
        lambda content: content.update(added_tokens=[]),
    ],
)
def test_other_merges_or_processing_are_another_tokenizer(tmp_path, change):
    folder = shutil.copytree("own/final_model", tmp_path / "model")
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert isinstance(read_tokenizer(folder, 300), ForeignTokenizer)


@pytest.mark.parametrize("fate", ["kept", "vocabulary lost", "all lost"])
def test_a_run_resumes_also_if_its_vocabulary_is_learnt_again(fate):
    workdir, loss = f"resumed {fate}", rows("own/metrics.jsonl")[-1]["loss"]
    shutil.copytree("own", workdir)
    shutil.rmtree(f"{workdir}/checkpoints/12")
    if fate == "vocabulary lost":
        VOCABULARY.unlink()
    elif fate == "all lost":
        shutil.rmtree("data")
    shown = train(workdir, *OWN, share="plain")
    assert ("Preparing" in shown) == (fate != "kept")
    assert rows(f"{workdir}/metrics.jsonl")[-1]["loss"] == loss
    texts = [Path(run, "final_model", "tokenizer.json").read_bytes() for run in (workdir, "own")]
    assert texts[0] == texts[1]


def test_a_changed_vocabulary_is_refused():
    VOCABULARY.write_bytes(VOCABULARY.read_bytes().replace(b"IQ==", b"Ig==", 1))
    assert f"{VOCABULARY} is not the vocabulary of meta.json" in refused(*OWN)
    VOCABULARY.write_bytes(b"\xff")
    assert f"{VOCABULARY} is not the vocabulary of meta.json" in refused(*OWN)


def test_another_vocabulary_with_the_same_ids_is_refused_on_resume(own):
    lines = VOCABULARY.read_bytes().splitlines()
    meta = json.loads((TOKENS / "meta.json").read_text())
    first, second = (line.split()[0] for line in lines[:2])
    lines[0], lines[1] = second + b" 0", first + b" 1"
    VOCABULARY.write_bytes(b"".join(line + b"\n" for line in lines))
    meta["tokenizer_sha256"] = hashlib.sha256(VOCABULARY.read_bytes()).hexdigest()
    (TOKENS / "meta.json").write_text(json.dumps(meta))
    assert "tokenizer_sha256 of the data is" in refused(*OWN)


def test_a_changed_vocabulary_in_a_checkpoint_is_detected(own, tmp_path):
    run = shutil.copytree("own", tmp_path / "run")
    (file,) = (run / "checkpoints" / "12" / "meta").glob("metadata")
    assert restore(run, None, "cpu").step == 12
    line = VOCABULARY.read_text().splitlines()[-1]
    assert line in file.read_text()
    file.write_text(file.read_text().replace(line, "YQ== 298"))
    restored = restore(run, None, "cpu")
    assert restored.step == 9
    assert restored.tokenizer.vocabulary == own.vocabulary


def test_tokens_of_another_tokenizer_are_refused():
    assert "set --config.data.tokenizer=gpt2 or prepare" in refused(
        "--config.data.tokenizer=own", "--config.data.dir=tokens", workdir="new"
    )
    assert "prepared with tokenizer own of 300 tokens, not gpt2 of 300" in refused(
        f"--config.data.dir={TOKENS}", workdir="new"
    )
    (TOKENS / "meta.json").unlink()
    flags = "--config.data.tokenizer=own", f"--config.data.dir={TOKENS}"
    assert "has no meta.json" in refused(*flags, workdir="new")
    assert "is not GPT-2's vocabulary" in refused(flags[1], workdir="new")
    assert not Path("new").exists()


def test_a_run_resumes_with_its_kind_of_tokenizer_only():
    assert "data.tokenizer is gpt2, the saved run has own" in refused("--config.data.dir=")
    assert "data.tokenizer is own, the saved run has gpt2" in refused(*OWN, workdir="run")


@pytest.mark.parametrize(("made", "asked"), [("own", "gpt2"), ("gpt2", "own")])
def test_a_directory_of_another_tokenizer_is_not_overwritten(tmp_path, made, asked, capsys):
    argv = ["--corpus", "text.txt", "--out", str(tmp_path / "out"), "--vocab_size", "300", "--val_fraction", "0.1"]
    prepare([*argv, "--tokenizer", made])
    before = tiny_run.listing(tmp_path)
    with pytest.raises(UsageError, match=f"was prepared with --tokenizer {made}, not {asked}"):
        prepare([*argv, "--tokenizer", asked])
    assert tiny_run.listing(tmp_path) == before


def test_the_advice_prepares_an_own_vocabulary():
    command = re.search(r"python -m jaxlm\.prepare (.*)", refused(OWN[0], "--config.data.dir=new", workdir="new"))[1]
    prepare(command.split())
    meta = json.loads(Path("new/meta.json").read_text())
    assert meta == json.loads((TOKENS / "meta.json").read_text())
    shutil.rmtree("new")


def test_too_small_a_text_is_refused_with_the_size_that_fits():
    line = refused(*OWN, "--config.model.vocab_size=5000", workdir="new")
    size = re.search(r"--config\.model\.vocab_size=(\d+)$", line)[1]
    assert 300 < int(size) < 5000
    assert not Path(f"data/text-txt-own-{size}").exists()


@pytest.mark.parametrize("size", [256, 65_537])
def test_the_size_has_bounds(size):
    assert "257 to 65536 for the tokenizer own" in refused(*OWN, f"--config.model.vocab_size={size}", workdir="new")


@pytest.mark.slow
def test_a_run_starts_from_a_model_of_its_own_vocabulary_only(own):
    flags = ["--config.init_from=own/final_model", "--config.max_steps=3"]
    train("started", *OWN, *flags, share="plain")
    check_init(tiny_run.config_of("started"), own)
    first, last = (row["loss"] for row in (rows("own/metrics.jsonl")[0], rows("own/metrics.jsonl")[-1]))
    assert rows("started/metrics.jsonl")[0]["loss"] < (first + last) / 2
    another = "another vocabulary than this run"
    assert another in refused(*flags, workdir="new")
    assert another in refused(*OWN, "--config.init_from=run/final_model", workdir="other")
    tiny_run.write_text(Path("other.txt"), "some words that others do not have, such as elephant and giraffe", seed=3)
    train("other2", *OWN, *flags, "--config.data.corpus=other.txt", share="plain")  # with the model's vocabulary
    (kept,) = Path("data").glob("other-txt-own-300*/tokenizer.tiktoken")
    assert kept.read_bytes() == VOCABULARY.read_bytes()
    open_data(read_config(["--config", "tiny.py", *OWN, "--config.data.corpus=other.txt"])[0])  # without a model
    assert Path("data/other-txt-own-300/tokenizer.tiktoken").read_bytes() != VOCABULARY.read_bytes()


def test_losses_are_in_bits_per_byte_of_the_same_text(own):
    """The bytes that an evaluation divides by are those of the text, by both vocabularies."""
    for directory, tokenizer in ((TOKENS, "own"), (Path("tokens"), "gpt2")):
        files = open_tokens(directory, 300, 16, tokenizer)
        assert files.text_bytes(files.val[1:]) == files.meta.val.bytes
        assert len(files.tokenizer.decode_bytes(files.val[1:])) == files.meta.val.bytes
        assert np.array_equal(files.tokenizer.encode(files.tokenizer.decode(files.val[1:])), files.val[1:])


def test_a_plan_needs_no_vocabulary(capsys, monkeypatch):
    replace_memory(monkeypatch, lambda config: MEMORY)
    flags = [*OWN, "--config.model.vocab_size=60000", "--config.data.corpus=unprepared.txt"]
    plan.main(["--config", "tiny.py", "--workdir", "new", "--json", "--no-measure", *flags])
    assert json.loads(capsys.readouterr().out)["model"]["parameters"] > 60_000 * 16
