"""The presets with the recipe of the study, in small sizes: they train, resume to the bit and export a Qwen3."""

import json
import shutil
from pathlib import Path

import pytest

from jaxlm.export import main as export
from jaxlm.interop.huggingface import read_sizes
from tests.tiny_run import assert_same_bits, config_of, saved_state, train, workplace

SIZES = {"vocab_size": 300, "context": 64, "layers": 2, "heads": 2, "width": 16, "mlp_width": 24}
FLAGS = [f"--config.model.{name}={size}" for name, size in SIZES.items()]
FLAGS += ["--config.data.corpus=text.txt", "--config.data.val_fraction=0.1", "--config.batch_size=2"]
FLAGS += ["--config.max_steps=6", "--config.save_interval=3", "--config.optimizer.warmup_steps=2"]
FLAGS += ["--config.sample.texts=2", "--config.sample.tokens=5"]

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("preset", "tokenizer"), [("m2_60m_fast", "gpt2"), ("m2_8k_fast", "own")])
def test_a_fast_preset_trains_resumes_to_the_bit_and_exports(tmp_path_factory, preset, tokenizer):
    with workplace(tmp_path_factory):
        train("whole", *FLAGS, config=preset, share="presets")
        config = config_of("whole")
        assert (config.data.tokenizer, config.optimizer.name, config.model.qk_norm) == (tokenizer, "muon", True)
        shutil.copytree("whole", "resumed", ignore=shutil.ignore_patterns("6", "final_model", "tensorboard", "lock"))
        assert "Resuming from step 3" in train("resumed", *FLAGS, config=preset, share="presets")
        assert_same_bits(saved_state("resumed", 6), saved_state("whole", 6))
        export(["--workdir", "resumed", "--out", "exported"])
        assert json.loads(Path("exported/config.json").read_text())["model_type"] == "qwen3"
        assert read_sizes(Path("exported")).vocab_size == 300
        weights = [Path(folder, "model.safetensors").read_bytes() for folder in ("exported", "whole/final_model")]
        assert weights[0] == weights[1]
