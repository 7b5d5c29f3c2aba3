"""Which directory of token files a run reads."""

import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from jaxlm import prepare
from jaxlm.config import Config, DataConfig, ModelConfig, from_config_dict, to_dict
from jaxlm.data.directories import check_named_directory, data_directory, own_directory
from jaxlm.data.encode import TRAINING_FLAGS
from jaxlm.data.token_files import open_tokens, read_meta
from jaxlm.errors import UsageError
from tests import tiny_run
from tests.data.test_token_files import GOOD, write
from tests.tiny_run import is_one_line, listing


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def config_of(corpus, directory):
    data = {"corpus": corpus, "dir": str(directory), "val_fraction": 0.1}
    return from_config_dict({"model": {"vocab_size": 300, "context": 16}, "data": data})


def refusal(corpus, directory, corpus_is_named=False):
    with pytest.raises(UsageError) as caught:
        check_named_directory(config_of(corpus, directory), corpus_is_named)
    assert is_one_line(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("corpus", "directory"), [("text.txt", "new"), ("it's my text.txt", "a folder/its tokens")])
def test_the_command_in_the_refusal_prepares_the_directory(corpus, directory):
    tiny_run.write_text(Path(corpus))
    command = shlex.split(re.search(r"python -m jaxlm\.prepare .*", refusal(corpus, directory)).group())
    prepare.main(command[3:])
    check_named_directory(config_of(corpus, directory), corpus_is_named=True)
    meta = open_tokens(Path(directory), 300, 16).meta
    assert (meta.source, meta.validation_fraction) == (corpus, 0.1)


@pytest.mark.parametrize("there", ["train.bin", "val.bin", "meta.json"])
def test_the_command_for_half_a_set_prepares_a_new_folder(there):
    tiny_run.write_text(Path("text.txt"))
    Path("half").mkdir()
    Path("half", there).touch()
    command = shlex.split(re.search(r"python -m jaxlm\.prepare .*", refusal("text.txt", "half/")).group())
    prepare.main(command[3:])
    check_named_directory(config_of("text.txt", command[command.index("--out") + 1]), corpus_is_named=True)
    assert [path.name for path in Path("half").iterdir()] == [there]


def test_a_misspelt_directory_is_refused_with_the_nearest_that_has_tokens():
    for name in ("mine", "other", "miem"):
        Path("data", name).mkdir(parents=True)
    for name in ("mine", "other"):
        Path("data", name, "train.bin").touch()
    for path in ("data/mien", "./data/mien/", str(Path("data/mien").absolute())):
        assert "did you mean " in (message := refusal("novels", path))
        assert str(Path(path).parent / "mine") in message
    Path("data/mine/train.bin").unlink()
    assert "did you mean" not in refusal("novels", "data/mien")


@pytest.mark.parametrize("directory", ["file/below", "file", "x" * 300, "a\0b/c", "\ud800/a", "nowhere/at/all"])
def test_any_directory_without_tokens_is_refused(directory):
    Path("file").touch()
    assert "has no train.bin and no val.bin" in refusal("novels", directory)


def test_tokens_of_another_text_are_refused_only_if_the_corpus_is_named():
    for name in ("a.txt", "b.txt"):
        tiny_run.write_text(Path(name))
    prepare.prepare("a.txt", Path("tokens"), 300, 0.1)
    for same in ("a.txt", "./a.txt", str(Path("a.txt").absolute())):
        check_named_directory(config_of(same, "tokens"), corpus_is_named=True)
    message = refusal("b.txt", "tokens", corpus_is_named=True)
    assert ("a.txt" in message, "b.txt" in message) == (True, True)
    check_named_directory(config_of("b.txt", "tokens"), corpus_is_named=False)
    Path("tokens/meta.json").unlink()  # as nanoGPT leaves them
    check_named_directory(config_of("b.txt", "tokens"), corpus_is_named=True)


def test_a_run_has_its_tokens_where_it_began():
    saved = to_dict(config_of("a.txt", "tokens"))
    assert own_directory(saved, config_of("a.txt", "")) == Path("tokens")
    assert own_directory(saved, config_of("./a.txt", "")) == Path("tokens")
    assert own_directory(saved, config_of("b.txt", "")) is None
    saved = to_dict(config_of("a.txt", ""))
    default = Path("data/a-txt-300")
    assert own_directory(saved, config_of(str(Path("a.txt").absolute()), "")) == default
    assert own_directory({}, config_of("a.txt", "")) == default  # config.json is lost
    for damaged in ({"corpus": 3}, {"corpus": None}, {"dir": "tokens"}):
        assert own_directory({"data": damaged}, config_of("a.txt", "")) is None
    own_directory({"data": {"corpus": "a.txt", "dir": 7}}, config_of("a.txt", ""))


@pytest.mark.parametrize(
    ("corpus", "directory", "expected"),
    [
        ("novels", "", "data/novels-300"),
        ("my text/a*.txt,é.txt", "", "data/my-text-a-txt-é-txt-300"),
        ("x" * 60, "", f"data/{'x' * 60}-300"),
        ("novels", "tokens", "tokens"),
    ],
)
def test_the_directory_is_named_after_corpus_and_vocabulary(corpus, directory, expected):
    config = Config(model=ModelConfig(vocab_size=300), data=DataConfig(corpus=corpus, dir=directory))
    assert data_directory(config) == Path(expected)


def test_long_names_of_the_same_beginning_have_directories_of_their_own():
    names = [
        *("x" * n for n in (60, 61, 62)),
        "books/" + "very long " * 20 + "a.txt",
        "books/" + "very long " * 20 + "b.txt",
    ]
    configs = [Config(data=DataConfig(corpus=name)) for name in names]
    assert len({data_directory(config) for config in configs}) == len(names)
    assert all(len(data_directory(config).name.encode()) < 255 for config in configs)


def test_what_was_prepared_under_data_is_prepared_again_beside_it():
    """A changed text, share or exclusion, and files of a person's, leave what is there."""
    config = config_of("texts", "")
    Path("texts").mkdir()
    tiny_run.write_text(Path("texts/a.txt"))
    tiny_run.write_text(Path("texts/b.txt"), seed=1)
    made = []

    def prepared(config):
        directory, data = data_directory(config), config.data
        prepare.prepare(data.corpus, directory, 300, data.val_fraction, TRAINING_FLAGS, exclude=data.exclude)
        assert data_directory(config) == directory  # and it is found again
        made.append(directory)
        return read_meta(directory)

    first = prepared(config)
    before = listing(made[0])
    prepared(replace(config, data=replace(config.data, val_fraction=0.2)))
    excluded = prepared(replace(config, data=replace(config.data, exclude=("b.txt",))))
    tiny_run.write_text(Path("texts/c.txt"), seed=2)
    grown = prepared(config)
    assert excluded.train.bytes < first.train.bytes < grown.train.bytes
    assert len(set(made)) == 4 and listing(made[0]) == before
    for directory, meta in ((made[0], first), (made[3], grown)):
        assert own_directory(to_dict(config), config, meta.train.sha256) == directory
    assert own_directory(to_dict(config), config, "of no tokens") == made[3]
    Path(made[0], "meta.json").unlink()  # as if a person had put the files there
    assert data_directory(config) == made[3]
    shutil.rmtree(made[0])
    assert data_directory(config) == made[0]


def test_another_split_or_corpus_of_that_name_has_a_directory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def directory(corpus, fraction):
        return data_directory(Config(model=ModelConfig(vocab_size=300), data=DataConfig(corpus, val_fraction=fraction)))

    first = directory("a b.txt", 0.1)
    first.parent.mkdir()
    write(first, GOOD, GOOD, {"source": "a b.txt", "validation_fraction": 0.1})
    assert directory("a b.txt", 0.1) == first
    others = {first, directory("a b.txt", 0.2), directory("a-b.txt", 0.1), directory("a-b.txt", 0.2)}
    assert len(others) == 4
    write(directory("tinystories", 0.1), GOOD, GOOD, {"source": "tinystories", "validation_fraction": None})
    assert directory("tinystories", 0.1) == directory("tinystories", 0.2)
