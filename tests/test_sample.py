"""The sampling command, with a model that spells 日, 本 and 語."""

import contextlib
import io
import itertools
import json
import os
import pty
import re
import subprocess
import sys
import termios
import threading
from argparse import Namespace
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm.config import Config, ModelConfig, to_dict
from jaxlm.core import sampling
from jaxlm.core.model import prepare_decode_params
from jaxlm.core.parameters import tree_of
from jaxlm.data.tokenizer import load_tokenizer
from jaxlm.errors import RunError, UsageError
from jaxlm.interop.huggingface import write_model
from jaxlm.run.checkpoint import Checkpoints
from jaxlm.run.load import LoadedModel
from jaxlm.run.memory import state_shapes
from jaxlm.sample import CHANGEABLE, COMMANDS, Session, _encode, _from_stdin, _line_groups, _print_all, main
from tests.tiny_run import is_one_line

FULL = "[日本語]{67}\ufffd"  # a prompt of one character and 200 tokens: 203, more than the context four times
CONFIG = Config(model=ModelConfig(vocab_size=300, context=46, layers=1, heads=2, width=32, mlp_width=24, tied=False))


class Terminal(io.StringIO):
    """Keeps what was shown at each flush."""

    def __init__(self, text=""):
        super().__init__(text)
        self.flushed = [""]

    def isatty(self):
        return True

    def flush(self):
        if self.getvalue() != self.flushed[-1]:
            self.flushed.append(self.getvalue())


def spelling_params(seed):
    """Parameters that give each byte of 日, 本 and 語 a byte that may follow it.

    Each token has its own direction in the embedding, and the head reads the directions of the tokens before it. The
    blocks are random and weak: they prefer one character to another, by all that comes before.
    """
    rng, tokenizer = np.random.default_rng(seed), load_tokenizer(CONFIG.model.vocab_size)
    characters = [tokenizer.encode(character).tolist() for character in "日本語"]
    ends = [tokenizer.end_of_text, *(last for _, _, last in characters)]
    pairs = [(end, first) for end in ends for first, _, _ in characters]
    pairs += [pair for character in characters for pair in itertools.pairwise(character)]
    ids = sorted(set(itertools.chain(*pairs)))

    def draw(parameter):
        mean, std = {"norm_scale": (1, 0), "matrix": (0, 0.07), "embedding": (0, 0)}[parameter.kind]
        return rng.normal(mean, std, parameter.shape).astype(np.float32)

    params = tree_of(CONFIG.model, draw)
    params["embedding"][ids, range(len(ids))] = 1
    params["head"][ids, len(ids) :] = rng.normal(0, 1, (len(ids), CONFIG.model.width - len(ids)))
    for before, after in pairs:
        params["head"][after, ids.index(before)] += 8
    return params


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), state_shapes(CONFIG))
    meta = {"config": to_dict(CONFIG), "tokens": {}, "seconds": 0.0}
    with contextlib.chdir(tmp_path_factory.mktemp("place")):
        checkpoints = Checkpoints(Path("run"))
        for step in (60, 120):
            checkpoints.save(step, zeros._replace(params=spelling_params(step)), meta)
        checkpoints.wait()
        params, tokenizer = spelling_params(120), load_tokenizer(300)
        write_model(Path("run/final_model"), CONFIG, params, tokenizer, "")
        write_model(Path("diverged"), CONFIG, jax.tree.map(lambda leaf: leaf * np.nan, params), tokenizer, "")
        yield


@pytest.fixture
def sample(capsys):
    """Runs the command; returns its stdout."""

    def sample(*flags):
        capsys.readouterr()
        main(["--workdir", "run", *flags])
        return capsys.readouterr().out

    return sample


def test_text_goes_to_stdout_and_the_rest_to_stderr(capsys):
    main(["--workdir", "run", "--prompt", "日本"])
    out, err = capsys.readouterr()
    assert out.startswith("日本")
    assert re.fullmatch(f"日{FULL}\n", out)
    assert "120" in err
    assert not re.search("[日本語]", err)


def test_without_a_prompt_it_samples_from_the_start(sample):
    assert len(sample().strip()) > 4


def test_each_prompt_gets_the_text_it_gets_alone_in_order(sample):
    prompts = ["語", "日本日", "日"]
    greedy = ("--temperature", "0")
    texts = sample(*(word for prompt in prompts for word in ("--prompt", prompt)), *greedy).strip().split("\n\n")
    for prompt, text in zip(prompts, texts, strict=True):
        assert text.startswith(prompt)
        assert re.fullmatch(f"[日本語]{{{66 + len(prompt)}}}\ufffd", text)
        assert sample("--prompt", prompt, *greedy) == f"{text}\n"


def test_seed_fixes_the_text(sample):
    texts = [sample("--prompt", "日", "--seed", seed) for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_temperature_0_ignores_the_seed(sample):
    flags = ("--prompt", "日", "--temperature", "0", "--seed")
    assert sample(*flags, "1") == sample(*flags, "2")


@pytest.mark.parametrize("flags", [("--top_k", "1"), pytest.param(("--top_p", "1e-6"), marks=pytest.mark.slow)])
def test_top_k_1_and_a_tiny_top_p_are_greedy(sample, flags):
    assert sample("--prompt", "日", "--seed", "5", *flags) == sample("--prompt", "日", "--temperature", "0")


def test_precision_sets_the_dtype_of_the_weights(sample, monkeypatch):
    dtypes = []

    def noting(config, params):
        weights = prepare_decode_params(config, params)
        dtypes.append(str(weights["head"].dtype))
        return weights

    monkeypatch.setattr("jaxlm.run.load.prepare_decode_params", noting)
    for function in ("_compile", "_print_all"):
        monkeypatch.setattr(f"jaxlm.sample.{function}", lambda *arguments: None)
    for precision in ("float32", "bf16", "bf16_matmul"):
        sample("--precision", precision)
    assert dtypes == ["float32", "bfloat16", "bfloat16"]


def test_a_text_compiles_nothing_after_the_weights_are_read(sample, monkeypatch):
    sizes = []

    def noting(*arguments):
        sizes.append(programs())
        _print_all(*arguments)

    def programs():
        return sampling.prefill._cache_size() + sampling._decode_on_device._cache_size()

    monkeypatch.setattr("jaxlm.sample._print_all", noting)
    before = programs()
    assert sample("--prompt", "日", "--tokens", "13")
    assert before < sizes[0] == programs()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "bf16_matmul"])
def test_each_precision_generates_text(sample, precision):
    assert re.fullmatch(f"{FULL}\n", sample("--prompt", "日", "--precision", precision))


def test_tokens_limits_the_text():
    with contextlib.redirect_stdout(Terminal()) as terminal:
        main(["--workdir", "run", "--prompt", "日", "--tokens", "42"])
    assert re.fullmatch("日[日本語]{14}\n", terminal.getvalue())


@pytest.mark.slow
def test_tokens_limits_the_text_in_a_pipe(sample):
    assert re.fullmatch("日[日本語]{3}\n", sample("--prompt", "日", "--tokens", "9"))


def test_a_text_goes_on_beyond_the_context(sample):
    assert re.fullmatch("日[日本語]{166}\ufffd\n", sample("--prompt", "日", "--tokens", "500", "--temperature", "0"))


def test_step_selects_the_checkpoint(capsys, sample):
    main(["--workdir", "run", "--step", "60", "--prompt", "日"])
    early, err = capsys.readouterr()
    assert "60" in err
    latest = sample("--prompt", "日")
    assert sample("--prompt", "日", "--step", "120") == latest != early


@pytest.mark.parametrize("flags", [["--seed", "3"], ["--temperature", "0"]])
def test_terminal_shows_the_same_text_as_it_is_generated(sample, flags):
    """Its chunks end inside characters of three tokens."""
    flags = ["--prompt", "日", *flags]
    piped = sample(*flags)
    with contextlib.redirect_stdout(Terminal()) as terminal:
        main(["--workdir", "run", *flags])
    assert terminal.getvalue() == piped
    assert len(terminal.flushed) > 4
    for shown in terminal.flushed:
        assert piped.startswith(shown)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--step", "31"], "60, 120"),
        (["--prompt", "日" * 30], "46"),
        (["--prompt", "short", "--prompt", "x" * 64], "46"),
        (["--tokens", "0"], "tokens"),
        (["--tokens", "many"], "--tokens"),
        (["--temperature", "-1"], "temperature"),
        (["--temperature", "nan"], "temperature"),
        (["--temperature", "inf"], "temperature"),
        (["--temperature", "1e39"], "temperature"),
        (["--top_k", "-1"], "top_k"),
        (["--top_p", "0"], "top_p"),
        (["--promt", "Once"], "--promt"),
        (["stray"], "stray"),
        (["--platform", "tpux"], "tpux"),
        (["--precision", "float8"], "float8"),
        (["--seed", str(2**70)], "seed"),
        (["--top_k", str(2**31)], "top_k"),
        (["--prompt", "\n\n" + "x" * 70], "46"),
        (["--prompt", "日", "--stdin"], "--stdin"),
        (["--model", "run/final_model"], "--model"),
    ],
)
def test_wrong_request_is_refused_in_one_line(capsys, flags, named):
    with pytest.raises(UsageError) as caught:
        main(["--workdir", "run", *flags])
    assert caught.value.exit_status == 2
    assert is_one_line(caught.value)
    assert named in str(caught.value)
    assert "sample." not in str(caught.value)  # a group of settings in a config file
    assert capsys.readouterr().out == ""


def test_directory_without_checkpoints_is_refused_and_unchanged(tmp_path):
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    for name in ("", "empty", "nowhere"):
        with pytest.raises(UsageError) as caught:
            main(["--workdir", str(tmp_path / name)])
        assert is_one_line(caught.value)
        assert str(tmp_path / name) in str(caught.value)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["checkpoints", "empty"]


def test_workdir_is_required():
    with pytest.raises(UsageError, match="--workdir"):
        main([])


def test_json_writes_one_object_per_line(sample):
    flags = ("--prompt", "日", "--prompt", "語\n", "--prompt", "本")
    objects = [json.loads(line) for line in sample(*flags, "--json").splitlines()]
    assert [row["prompt"] for row in objects] == ["日", "語\n", "本"]
    assert "\n\n".join(row["text"] for row in objects) + "\n" == sample(*flags)


@pytest.fixture
def type_in(monkeypatch):
    """Sets what stdin holds."""
    with contextlib.ExitStack() as files:

        def type_in(text):
            Path("typed").write_bytes(text if isinstance(text, bytes) else text.encode())
            monkeypatch.setattr("sys.stdin", files.enter_context(Path("typed").open()))

        yield type_in


def test_each_line_of_stdin_is_a_prompt(sample, type_in, monkeypatch):
    monkeypatch.setattr("jaxlm.sample.PROMPT_BATCH", 3)
    prompts = ["語", "", "日本日", "本", "本", "本"]
    type_in("".join(f"{prompt}\n" for prompt in prompts))
    objects = [json.loads(line) for line in sample("--stdin", "--json").splitlines()]
    assert [row["prompt"] for row in objects] == prompts
    assert all(row["text"].startswith(row["prompt"]) for row in objects)
    assert len({row["text"] for row in objects[3:]}) > 1
    given = sample(*(word for prompt in prompts for word in ("--prompt", prompt)))
    assert given == "\n\n".join(row["text"] for row in objects) + "\n"


@pytest.mark.slow
def test_the_text_of_a_line_does_not_depend_on_its_neighbours(sample, type_in, capsys):
    """Neither on a prompt whose window slides after one token, nor on one that does not fit."""

    def texts(*prompts):
        type_in("\n".join(prompts))
        return [json.loads(line)["text"] for line in sample("--stdin", "--json").splitlines()]

    first, second, third = texts("語", "日本", "語")
    assert all(re.fullmatch(f"日?{FULL}", text) for text in (first, second, third))
    assert first != third
    beside_long = texts("日" * 15, "日本", "語")
    assert beside_long[1:] == [second, third]
    assert re.fullmatch(f"日{{14}}{FULL}", beside_long[0])
    type_in("語\n" + "日" * 30 + "\n語\n")
    with pytest.raises(UsageError):
        main(["--workdir", "run", "--stdin"])
    assert capsys.readouterr().out == f"{first}\n\n{third}\n"


def test_windows_line_ends_and_a_byte_order_mark_are_no_prompt(sample, type_in):
    type_in("\ufeff日\r\n\r\n\ufeff本\r\r".encode())
    prompts = [json.loads(line)["prompt"] for line in sample("--stdin", "--json", "--tokens", "1").splitlines()]
    assert prompts == ["日", "", "\ufeff本\r"]


def test_empty_stdin_writes_nothing(sample, type_in):
    type_in("")
    assert sample("--stdin") == ""


def test_without_a_prompt_the_lines_of_a_pipe_are_prompts(sample, type_in, monkeypatch):
    """An empty one gives the text without a prompt, and beside --prompt none is read."""
    texts = sample("--prompt", "日", "--prompt", "語"), sample()
    type_in("日\n語\n")
    assert sample() == texts[0]
    assert sample("--prompt", "日") == texts[0].split("\n")[0] + "\n"
    type_in("")
    assert sample() == texts[1]
    reading, writing = os.pipe()
    os.write(writing, "日\n語\n".encode())
    os.close(writing)
    with os.fdopen(reading) as pipe, open(os.devnull) as empty:
        monkeypatch.setattr("sys.stdin", pipe)
        assert sample() == texts[0]
        monkeypatch.setattr("sys.stdin", empty)
        assert sample() == texts[1]


def test_a_text_that_has_ended_is_not_continued(echoing, monkeypatch, capsys):
    loaded, chunks = echoing
    chunks.append([65, loaded.tokenizer.end_of_text])
    monkeypatch.setattr("sys.stdin", io.StringIO("b\n\n/more c\n"))
    Session(loaded, Namespace(**dict.fromkeys(CHANGEABLE, 1))).run()
    out, err = capsys.readouterr()
    decoded = loaded.tokenizer.decode([65])
    assert out == f"b{decoded}\n c{decoded}\n"
    assert err.count("error: the text has ended") == 1


def test_a_folder_as_stdin_is_refused_in_one_line(monkeypatch):
    folder = os.open(".", os.O_RDONLY)
    monkeypatch.setattr("sys.stdin", Namespace(fileno=lambda: folder))
    with pytest.raises(UsageError, match=r"cannot read stdin \(Is a directory\)"):
        main(["--workdir", "run", "--stdin"])
    os.close(folder)


def test_an_unfit_line_is_named_and_the_others_are_answered(type_in, capsys):
    type_in(b"\xff\n" + "日\n".encode() + b"x" * 46 + b"\n\n\xe6\x97")
    with pytest.raises(UsageError, match="3 of 5 lines") as caught:
        main(["--workdir", "run", "--stdin", "--json"])
    assert (caught.value.exit_status, is_one_line(caught.value)) == (2, True)
    out, err = capsys.readouterr()
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == ["日", ""]
    errors = err.splitlines()[1:]
    for error, beginning in zip(errors, ("line 1: .*UTF-8", "line 3: .* 46 tokens", "line 5: .*UTF-8"), strict=True):
        assert re.match(f"error: {beginning}", error)


@pytest.fixture
def pipe():
    """The two ends of a pipe. The writing end is closed after a while, so that no test waits for ever."""
    reading, writing = os.pipe()
    with os.fdopen(reading) as reader, os.fdopen(writing, "wb", buffering=0) as writer:
        timer = threading.Timer(20, writer.close)
        timer.start()
        yield reader, writer
        timer.cancel()


def test_lines_come_in_groups_that_wait_for_the_first_line_only(pipe):
    reader, writer = pipe
    groups = _line_groups(reader.fileno())
    writer.write(b"a\n\nb")
    assert next(groups) == [b"a", b""]
    writer.write(b"c\n")
    assert next(groups) == [b"bc"]
    writer.write(b"x\n" * 20)
    assert [len(next(groups)), len(next(groups))] == [16, 4]
    writer.write(b"end")
    writer.close()
    assert list(groups) == [[b"end"]]


def test_the_lines_of_a_file_come_in_full_groups(type_in, monkeypatch):
    monkeypatch.setattr("jaxlm.sample.READ_BYTES", 7)
    type_in("".join(f"{number}\n" for number in range(40)))
    groups = list(_line_groups(sys.stdin.fileno()))
    assert [len(group) for group in groups] == [16, 16, 8]
    assert b"\n".join(itertools.chain(*groups)).split() == [b"%d" % number for number in range(40)]


@pytest.fixture
def echoing(monkeypatch):
    """A model that adds what the test appends to the list, one chunk each."""
    chunks = []
    monkeypatch.setattr(
        "jaxlm.sample._generate", lambda _, group, *__: (np.array([ids] * len(group), int) for ids in chunks)
    )
    return LoadedModel(ModelConfig(context=40), None, load_tokenizer(257)), chunks


def test_an_open_pipe_is_answered_line_by_line(pipe, echoing, monkeypatch, capsys):
    """Each line is written once the one before is answered."""
    (reader, writer), (loaded, chunks) = pipe, echoing
    monkeypatch.setattr("sys.stdin", reader)
    chunks.append([])
    answers, arguments = [], Namespace(**dict.fromkeys(CHANGEABLE, 1), json=False)

    def lines():
        groups = _from_stdin(loaded)
        for line in (b"one\n", b"two\n"):
            writer.write(line)
            yield next(groups)
            answers.append(capsys.readouterr().out)
        assert not writer.closed

    _print_all(loaded, lines(), arguments)
    assert answers == ["one\n", "\ntwo\n"]


CODES = "\x1b[2J\x9b3日\x07\u202e\x7f\x00\t\n本\r"


def test_sampled_text_cannot_control_a_terminal(echoing, capsys):
    """Its bytes come one by one. In a pipe they are unchanged."""
    loaded, chunks = echoing
    chunks += [[int(i)] for i in loaded.tokenizer.encode(CODES)]
    arguments = Namespace(**dict.fromkeys(CHANGEABLE, 1), json=False)
    group = [_encode(loaded, 0, CODES)]
    with contextlib.redirect_stdout(Terminal()) as terminal:
        _print_all(loaded, [group], arguments)
    assert terminal.getvalue() == " [2J 3日    \t\n本 " * 2 + "\n"
    chunks[:] = [[int(i) for i in loaded.tokenizer.encode(CODES)]]
    with contextlib.redirect_stdout(Terminal()) as terminal:
        _print_all(loaded, [group * 2], arguments)
    assert not set(terminal.getvalue()) & set("\x1b\x9b\x07\u202e\x7f\x00\r")
    _print_all(loaded, [group], arguments)
    assert capsys.readouterr().out == CODES * 2 + "\n"


def test_weights_that_are_not_finite_end_the_command_with_advice(capsys):
    for flags in ([], ["--temperature", "0"]):
        with pytest.raises(RunError, match=r"not finite.*--step") as caught:
            main(["--model", "diverged", "--prompt", "日", *flags])
        assert (caught.value.exit_status, is_one_line(caught.value)) == (1, True)
        assert capsys.readouterr().out == ""


def test_exported_folder_gives_the_same_text(sample, capsys):
    flags = ["--prompt", "日"]
    text = sample(*flags)
    main(["--model", "run/final_model", *flags])
    out, err = capsys.readouterr()
    assert out == text
    assert "run/final_model" in err


TYPED = [
    "/again",
    "/tokens 45",
    "日",
    "日",
    "/again",
    "/seed",
    "/seed 0",
    "日",
    "/temperature -1",
    "/heat 3",
    "/tokns 3",
]
TYPED += ["/tokens x", "日" * 30, "/temperature 0", "語", "", "/more 本", "/tokens 90", "語", "/help", "  "]


def check_session(output, err):
    """Compares what a session shows after TYPED and Ctrl-D."""
    first, same, again, back, greedy, further, more, whole, blank = output.removesuffix("\n").split("\n")
    assert first == same == back != again
    assert re.fullmatch("日[日本語]{15}", again)
    assert whole == greedy + further  # so it keeps all that it wrote
    assert re.fullmatch(" 本[日本語]{15}", more)
    assert blank.startswith("  ")
    _, greeting, *answers = err.split("\n")  # the first names the checkpoint
    assert "no chat" in greeting
    assert "/help" in greeting
    errors = [line for line in answers if "error" in line]
    named = ("nothing is written", "temperature", "/help shows", "did you mean /tokens", "such as 45", "46")
    for line, name in zip(errors, named, strict=True):
        assert re.fullmatch(f"> +(> )*error: .*{re.escape(name)}.*", line)
    assert any(line.endswith("> /seed 1") for line in answers)
    assert all(f"/{command}" in err for command in COMMANDS)


def test_session_continues_what_is_typed_until_the_input_ends(monkeypatch, capsys):
    typed = Terminal("".join(f"{line}\n" for line in TYPED))
    monkeypatch.setattr("sys.stdin", typed)
    with contextlib.redirect_stdout(Terminal()) as terminal:
        main(["--workdir", "run"])
    check_session(terminal.getvalue(), capsys.readouterr().err)


@pytest.mark.parametrize("line", ["/quit", "/quit now"])
def test_quit_ends_the_session(monkeypatch, capsys, line):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{line}\n/heat\n"))
    Session(None, None).run()
    assert "error" not in capsys.readouterr().err


@pytest.mark.slow
def test_session_in_a_terminal():
    """All lines are typed at once, then Ctrl-D; the terminal does not echo them."""
    terminal, inside = pty.openpty()
    modes = termios.tcgetattr(inside)
    modes[3] &= ~termios.ECHO
    termios.tcsetattr(inside, termios.TCSANOW, modes)
    os.write(terminal, "".join(f"{line}\n" for line in TYPED).encode() + b"\x04")
    environment = {"PYTHONPATH": str(Path(__file__).parent.parent)}
    process = subprocess.run(
        [sys.executable, "-m", "jaxlm.sample", "--workdir", "run"],
        **dict(stdin=inside, stdout=inside, stderr=subprocess.PIPE, env=os.environ | environment, timeout=120),
    )
    assert process.returncode == 0
    os.close(inside)
    output = b""
    with contextlib.suppress(OSError):  # Linux raises it after the last byte
        while more := os.read(terminal, 10_000):
            output += more
    os.close(terminal)
    check_session(output.decode().replace("\r\n", "\n"), process.stderr.decode())


def test_ctrl_c_ends_the_text_but_not_the_session(monkeypatch, capsys):
    loaded, arguments = LoadedModel(None, None, load_tokenizer(300)), []

    def interrupted(*call):
        arguments.append(call)
        yield np.array([[65]])
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxlm.sample._generate", interrupted)
    monkeypatch.setattr("sys.stdin", io.StringIO("a\n/top_k 3\nb\n\n/again\n"))
    Session(loaded._replace(config=ModelConfig(context=9)), Namespace(**dict.fromkeys(CHANGEABLE, 1))).run()
    decoded = load_tokenizer(300).decode([65])
    assert capsys.readouterr().out == f"a{decoded}\nb{decoded}\n{decoded}\n{decoded}\n"
    assert [(call[2].top_k, call[2].seed) for call in arguments] == [(1, 1), (3, 1), (3, 1), (3, 2)]
    assert [call[1][0].number for call in arguments] == [0, 0, 1, 1]


def test_save_in_progress_is_left_alone(sample):
    unfinished = Path("run/checkpoints/125.orbax-checkpoint-tmp")
    unfinished.mkdir()
    (unfinished / "part").write_text("")
    sample("--prompt", "日")
    assert (unfinished / "part").exists()


@pytest.fixture
def damaged():
    """The newest checkpoint has lost an array."""
    folder = Path("run/checkpoints/120/params")
    contents = {path: path.read_bytes() for path in folder.rglob("d/*")}
    for path in contents:
        path.write_bytes(b"")
    yield
    for path, data in contents.items():
        path.write_bytes(data)


def test_damaged_newest_checkpoint_is_named_and_the_previous_one_used(damaged, capsys):
    main(["--workdir", "run", "--prompt", "日"])
    out, err = capsys.readouterr()
    assert re.search("(?m)^Skipped checkpoints/120: .+$", err)
    assert "step 60" in err
    main(["--workdir", "run", "--prompt", "日", "--step", "60"])
    assert capsys.readouterr().out == out


def test_damaged_checkpoint_named_by_step_is_refused(damaged):
    with pytest.raises(UsageError, match="checkpoints/120") as caught:
        main(["--workdir", "run", "--step", "120"])
    assert is_one_line(caught.value)
