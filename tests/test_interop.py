"""The same numbers in other programs: pip install -e ".[interop]" && python -m pytest -m interop

llama.cpp is compared if it is installed, which takes five minutes:
CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" pip install llama-cpp-python==0.3.36
"""

import json
import os
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import interop
from jaxlm.config import Config, ModelConfig
from jaxlm.core.decoder import Decoder
from jaxlm.data.corpus import open_corpus
from jaxlm.data.tokenizer import load_tokenizer
from jaxlm.export import main as export
from jaxlm.interop.gguf import write_gguf
from jaxlm.interop.huggingface import ForeignTokenizer, read_params
from jaxlm.main import open_data
from jaxlm.run.load import load
from jaxlm.sample import main as sample
from jaxlm.storage.jsonl import rows_up_to
from tests import tiny_run

pytestmark = pytest.mark.interop

STEPS = 20
SIZES = {"vocab_size": 1024, "context": 128, "layers": 2, "heads": 4, "kv_heads": 2, "width": 64, "mlp_width": 160}
QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run of the quickstart, smaller and of a part of its text: its directory, checkpoint and tokens."""
    place, before = tmp_path_factory.mktemp("quickstart"), Path.cwd()
    os.chdir(place)
    text = "".join(chunk.text for chunk in open_corpus("novels").train())
    Path("text.txt").write_text(text[:300_000], encoding="utf-8")
    every = [f"--config.{name}={STEPS}" for name in ("max_steps", "save_interval", "generation_interval")]
    sizes = [f"--config.model.{name}={size}" for name, size in SIZES.items()]
    tiny_run.train("run", *every, *sizes, "--config.data.corpus=text.txt", config=str(QUICKSTART))
    checkpoint = interop.restore_on_cpu(place / "run")
    yield place / "run", checkpoint, open_data(checkpoint.config)
    os.chdir(before)


@pytest.fixture(scope="module")
def ours():
    """jaxlm's logits and greedy tokens, computed once for all programs that read a subject."""
    cached = {}

    def once(function):
        def of(subject, ids):
            key = function, subject.folder
            if key not in cached:
                cached[key] = function(subject, ids)
            return cached[key]

        return of

    return {name: once(getattr(interop, name)) for name in ("logits", "greedy")}


@pytest.fixture(scope="module", params=["trained", "tied", "shared"])
def subject(request, tmp_path_factory):
    """An exported model, and input ids for it: a Qwen3 with its own vocabulary, and two Llamas with that of GPT-2."""
    place = tmp_path_factory.mktemp("subject")
    if request.param == "trained":
        _, checkpoint, tokens = request.getfixturevalue("run")
        ids = np.array(tokens.val[: checkpoint.config.model.context], np.int64)
        return interop.export(place, checkpoint.config, checkpoint.params, checkpoint.tokenizer), ids
    sizes = {"context": 128, "layers": 2, "heads": 4, "width": 64, "mlp_width": 160}
    if request.param == "shared":
        sizes |= {"vocab_size": 4096, "kv_heads": 2, "tied": False, "rope_theta": 5e5, "norm_eps": 1e-5}
    model = ModelConfig(**sizes, precision="float32", implementation="xla")
    ids = np.random.default_rng(0).integers(0, model.vocab_size, model.context)
    tokenizer = load_tokenizer(model.vocab_size)
    return interop.export(place, Config(model=model), interop.random_params(model), tokenizer), ids


@pytest.mark.parametrize("program", interop.PEERS)
def test_logits_gradients_texts_and_token_ids_are_those_of_jaxlm(monkeypatch, ours, subject, program):
    pytest.importorskip(program)
    monkeypatch.setattr(interop, "GREEDY_TOKENS", 50)
    for name, function in ours.items():
        monkeypatch.setattr(interop, name, function)
    model, ids = subject
    differences = dict(interop.PEERS[program](model, ids, ids))
    assert differences.pop("logits") < 1e-4
    assert differences.pop("gradients", 0) < 1e-4
    assert len(differences) == 2
    assert set(differences.values()) == {0}  # tokens and texts that differ


@pytest.mark.parametrize(("dtype", "tolerance"), [("f16", 2e-3), ("q8_0", 5e-2)])
def test_llama_cpp_reads_the_smaller_files(run, tmp_path, dtype, tolerance):
    llama_cpp = pytest.importorskip("llama_cpp")
    _, checkpoint, tokens = run
    write_gguf(tmp_path / "model.gguf", checkpoint.config.model, checkpoint.params, checkpoint.tokenizer, dtype)
    model = llama_cpp.Llama(str(tmp_path / "model.gguf"), n_ctx=128, logits_all=True, verbose=False)
    ids = np.array(tokens.val[:128], np.int64)
    model.eval(ids.tolist())
    subject = interop.Subject(checkpoint.config.model, checkpoint.params, checkpoint.tokenizer, Path(), Path())
    ours = interop.logits(subject, ids)
    assert interop.worst(model.scores[:128], ours) < tolerance


def test_llama_cpp_writes_the_text_of_sample(run, tmp_path, capsys):
    """With the snippet of docs/interop.md."""
    llama_cpp = pytest.importorskip("llama_cpp")
    workdir, *_ = run
    export(["--workdir", str(workdir), "--out", str(tmp_path / "model.gguf"), "--dtype", "f32"])
    capsys.readouterr()
    sample(["--workdir", str(workdir), "--prompt", "The prince looked", "--temperature", "0", "--tokens", "100"])
    model = llama_cpp.Llama(str(tmp_path / "model.gguf"), n_ctx=128, verbose=False)
    greedy = {"max_tokens": 100, "temperature": 0, "repeat_penalty": 1.0, "echo": True}
    text = model.create_completion("The prince looked", **greedy)
    assert text["choices"][0]["text"] + "\n" == capsys.readouterr().out
    assert model.metadata["general.name"] == "model"


def test_bits_per_byte_are_those_of_the_run(run):
    pytest.importorskip("transformers")
    workdir, checkpoint, tokens = run
    *_, last = rows_up_to(workdir / "metrics.jsonl", STEPS)
    bits = interop.bits_per_byte_of_transformers(workdir / "final_model", tokens, checkpoint.config.model.context)
    assert bits == pytest.approx(last["val_bits_per_byte"], abs=1e-4)


def test_lm_eval_gives_the_bits_per_byte_of_jaxlm(run, monkeypatch):
    pytest.importorskip("lm_eval")
    workdir, checkpoint, tokens = run
    model, tokenizer = checkpoint.config.model, checkpoint.tokenizer
    # whole sequences only, as lm-eval may extend the last one
    candidates = (tokens.val[1 : 1 + count * model.context] for count in range(10, 0, -1))
    ids = next(ids for ids in candidates if np.array_equal(tokenizer.encode(tokenizer.decode(ids)), ids))
    Path("my.txt").write_text(tokenizer.decode(ids), newline="")
    inputs = np.concatenate([[tokenizer.end_of_text], ids[:-1]]).reshape(-1, model.context)
    targets = ids.reshape(-1, model.context).astype(np.int32)
    loss_sum = Decoder(model).apply({"params": checkpoint.params}, inputs, targets, method="loss")

    task = ["--tasks", "my_text", "--include_path", str(Path(interop.__file__).parent / "lm_eval")]
    model_args = f"pretrained={workdir / 'final_model'},dtype=float32"
    command = ["run", "--model", "hf", "--model_args", model_args, *task, "--device", "cpu", "--output_path", "results"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "argv", ["lm_eval", *command])
    runpy.run_module("lm_eval", run_name="__main__")  # here, where its libraries are imported
    (file,) = Path("results").rglob("results*.json")
    bits = json.loads(file.read_text())["results"]["my_text"]["bits_per_byte,none"]
    assert bits == pytest.approx(float(loss_sum) / np.log(2) / len(tokenizer.decode_bytes(ids)), abs=1e-4)


@pytest.fixture(scope="module", params=["Llama", "Qwen3"])
def foreign(request, tmp_path_factory):
    """A random Llama or Qwen3 saved by transformers in bfloat16 and several files, with its own tokenizer."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    import tokenizers

    folder = tmp_path_factory.mktemp("foreign")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"])
    tokenizer.train([str(path) for path in QUICKSTART.parent.parent.glob("jaxlm/*.py")], trainer)
    first = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.post_processor = first
    sizes = {"vocab_size": 400, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64}
    heads |= {"head_dim": 16, "rope_theta": 1e5, "eos_token_id": 2}
    config_class, model_class = (getattr(transformers, request.param + name) for name in ("Config", "ForCausalLM"))
    config = config_class(**sizes, **heads, rms_norm_eps=1e-5, initializer_range=0.1)
    torch.manual_seed(0)
    model = model_class(config).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            torch.nn.init.uniform_(parameter, 0.5, 2)
    model.save_pretrained(folder, max_shard_size="200KB")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    assert (folder / "model.safetensors.index.json").exists()
    return folder, model_class.from_pretrained(folder, dtype=torch.float32)


def test_a_foreign_model_has_the_logits_of_transformers(foreign):
    import torch

    folder, theirs = foreign
    config, _, tokenizer = load(folder, "cpu")
    params = read_params(folder, config)
    assert (config.kv_heads, config.tied, config.rope_theta) == (2, False, 1e5)
    assert config.qk_norm == (theirs.config.model_type == "qwen3")
    assert isinstance(tokenizer, ForeignTokenizer)
    ids = np.random.default_rng(0).integers(0, 400, (1, 64))
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    assert interop.worst(np.asarray(Decoder(config).apply({"params": params}, ids)), expected) < 1e-4


def test_a_foreign_model_writes_the_text_of_transformers(foreign, capsys):
    import torch
    from transformers import AutoTokenizer

    folder, theirs = foreign
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("def rope(", return_tensors="pt").input_ids
    assert ids[0, 0] == 1
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20)
    capsys.readouterr()
    sample(["--model", str(folder), "--prompt", "def rope(", "--temperature", "0", "--tokens", "20"])
    assert capsys.readouterr().out == tokenizer.decode(expected[0], skip_special_tokens=True) + "\n"
