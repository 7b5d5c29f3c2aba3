"""The settings of a run: names, defaults, bounds.

A config file returns an `ml_collections.ConfigDict` (from `default_config()`), flags override it, and
`from_config_dict` checks the result and builds the frozen dataclasses that the rest of the program takes.

A run cannot resume with another value of a setting marked `FIXED`, because it defines what the checkpoint means.
`python -m experiments.document_config` makes docs/configuration.md from the comments here.
"""

import dataclasses
import difflib
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_collections

from jaxlm.errors import UsageError

FIXED = {"fixed": True}

PLATFORMS = ("auto", "cpu", "cuda", "mps", "metal")
PRECISIONS = ("auto", "float32", "bf16", "bf16_matmul")
OPTIMIZERS = ("adamw", "muon")  # the functions are in core/optimizer.py
LR_SCHEDULES = ("cosine", "linear")  # likewise
IMPLEMENTATIONS = ("auto", "xla", "cpu", "cuda", "hopper", "apple")

# Names of settings in old config files and checkpoints, and their present names. If several have one present name, the
# last in this order wins.
OLD_NAMES = {
    "slices": "microbatch_chunks",
    "max_skipped": "max_nonfinite_microbatches",
    "model.hidden": "model.mlp_width",
    "model.dtype": "model.precision",
    "model.attention": "model.implementation",
    "model.kernels": "model.implementation",
    "model.loops": "model.implementation",
    "optimizer.decay": "optimizer.lr_schedule",
    "optimizer.decay_fraction": "optimizer.lr_decay_fraction",
    "optimizer.floor": "optimizer.min_lr_ratio",
    "data.validation": "data.val_fraction",
    "data.eval_windows": "data.eval_sequences",
}
# Old values of those settings, and their present values. None: the setting keeps its default.
OLD_VALUES: dict[str, dict[str, str | None]] = {
    "model.dtype": {"auto": "auto", "float32": "float32", "bfloat16": "bf16", "mixed": "bf16_matmul"},
    "model.attention": {"auto": None, "plain": None, "cudnn": "cuda"},
    "model.kernels": {"auto": None, "plain": None, "fused": "hopper"},
    "model.loops": {"auto": None, "compiled": None, "unrolled": "apple"},
}

PROMPTS = (
    "Once upon a time",
    "One day, a little girl",
    "The old man",
    "There was a small dog",
    "In the middle of the night",
    "A boy named Tom",
    "It was a sunny day",
    "The king said",
    "Mother looked at",
    "At the end of the road",
    "She opened the door",
    "He did not know",
    "The cat and the bird",
    "Far away in the forest",
    "My friend told me",
    "On the first day of winter",
    "They ran to the river",
    "When the sun came up",
    "Nobody had ever seen",
    "After dinner",
)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UsageError(message)


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    _require(value in known, f"{name} is {value!r:.100}: {_nearest(value, known)}it is one of {', '.join(known)}")


def _nearest(name: str, known: typing.Iterable[str]) -> str:
    match = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {match[0]}? " if match else ""


@dataclass(frozen=True)
class ModelConfig:
    """The decoder: sizes, initialisation and how it is computed."""

    vocab_size: int = field(default=50_257, metadata=FIXED)  # tokens; a smaller vocabulary has GPT-2's first ones
    context: int = field(default=1024, metadata=FIXED)  # tokens in a sequence
    layers: int = field(default=8, metadata=FIXED)  # blocks, each of attention and an MLP
    heads: int = field(default=8, metadata=FIXED)  # attention heads, each of width / heads numbers
    kv_heads: int = field(default=0, metadata=FIXED)  # heads of keys and values, shared by the queries'; 0: as many
    width: int = field(default=512, metadata=FIXED)  # numbers per position in the residual stream
    mlp_width: int = field(default=2048, metadata=FIXED)  # numbers per position inside the MLP
    rope_theta: float = field(default=10_000.0, metadata=FIXED)  # base of RoPE's frequencies
    norm_eps: float = field(default=1e-6, metadata=FIXED)  # RMSNorm adds it to the mean square
    tied: bool = field(default=True, metadata=FIXED)  # the head reads the input embedding; False: one of its own
    output_init: str = "scaled"  # of each block's two output projections: scaled (0.02 / sqrt(2 layers)) or zero
    precision: str = "auto"  # float32, bf16 (mixed precision) or bf16_matmul; weights are always float32
    implementation: str = "auto"  # of jaxlm/core/ops: xla (plain JAX), cpu, cuda, hopper (H100, H200) or apple
    remat: bool = True  # recompute each block backward: less memory, a fifth more work. GPU: needs microbatch_chunks

    def __post_init__(self):
        for name in ("vocab_size", "context", "layers", "heads", "width", "mlp_width"):
            _require(getattr(self, name) >= 1, f"model.{name} is {getattr(self, name)}: it must be at least 1")
        _require(
            self.width % (2 * self.heads) == 0,
            f"model.width {self.width} does not divide into {self.heads} heads of an even size (RoPE rotates pairs):"
            f" choose a multiple of {2 * self.heads}",
        )
        _require(
            self.kv_heads >= 0 and self.heads % (self.kv_heads or self.heads) == 0,
            f"model.kv_heads is {self.kv_heads}: it must divide the {self.heads} heads (0: as many)",
        )
        _require(self.rope_theta > 0, f"model.rope_theta is {self.rope_theta}: it must be above 0")
        _require(self.norm_eps > 0, f"model.norm_eps is {self.norm_eps}: it must be above 0")
        _one_of("model.output_init", self.output_init, ("scaled", "zero"))
        _one_of("model.precision", self.precision, PRECISIONS)
        _one_of("model.implementation", self.implementation, IMPLEMENTATIONS)

    @property
    def matmul_dtype(self) -> str:
        """The dtype that matmuls read; they sum in float32."""
        return "bfloat16" if self.precision in ("bf16", "bf16_matmul") else "float32"

    @property
    def activation_dtype(self) -> str:
        """The dtype of everything between two matmuls."""
        return "bfloat16" if self.precision == "bf16" else "float32"


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, or Muon on the blocks' matrices and AdamW on the rest. Both follow one schedule."""

    name: str = field(default="adamw", metadata=FIXED)  # adamw, or muon: Muon on the matrices of the blocks
    learning_rate: float = 3e-4  # peak
    muon_learning_rate: float = 6e-3  # peak, of the matrices that Muon updates
    warmup_steps: int = 100  # optimizer steps over which the learning rate rises to its peak
    lr_schedule: str = "cosine"  # how the learning rate falls: cosine or linear
    lr_decay_fraction: float = 1.0  # it falls over this fraction of the steps after the warm-up, the last ones
    min_lr_ratio: float = 0.1  # learning rate at max_steps, as a fraction of the peak
    b1: float = 0.9  # decay of Adam's first moment; Muon's momentum
    b2: float = 0.95  # decay of Adam's second moment
    weight_decay: float = 0.1  # decoupled; on all parameters but norm scales
    clip_norm: float = 1.0  # the largest global norm of a gradient; a larger one is scaled down

    def __post_init__(self):
        _one_of("optimizer.name", self.name, OPTIMIZERS)
        _one_of("optimizer.lr_schedule", self.lr_schedule, LR_SCHEDULES)
        for name in ("learning_rate", "muon_learning_rate", "clip_norm"):
            _require(getattr(self, name) > 0, f"optimizer.{name} is {getattr(self, name)}: it must be above 0")
        for name in ("warmup_steps", "weight_decay"):
            _require(getattr(self, name) >= 0, f"optimizer.{name} is {getattr(self, name)}: it must not be negative")
        for name in ("lr_decay_fraction", "min_lr_ratio"):
            _require(
                0 <= getattr(self, name) <= 1, f"optimizer.{name} is {getattr(self, name)}: it must be between 0 and 1"
            )
        for name in ("b1", "b2"):
            _require(
                0 <= getattr(self, name) < 1,
                f"optimizer.{name} is {getattr(self, name)}: it must be at least 0 and below 1",
            )


@dataclass(frozen=True)
class DataConfig:
    """The corpus, its token files and the validation split."""

    corpus: str = "novels"  # a named corpus, or paths and patterns separated by commas
    dir: str = ""  # directory of train.bin and val.bin; empty: data/CORPUS-VOCABULARY
    val_fraction: float = 0.01  # of the text, held out for validation
    eval_sequences: int = 64  # of `context` tokens, per evaluation, evenly spaced; 0: the whole validation text

    def __post_init__(self):
        _require(bool(self.corpus or self.dir), "data.corpus and data.dir are both empty: name one of them")
        _require(0 < self.val_fraction < 1, f"data.val_fraction is {self.val_fraction}: it must be between 0 and 1")
        _require(self.eval_sequences >= 0, f"data.eval_sequences is {self.eval_sequences}: it must not be negative")


@dataclass(frozen=True)
class SampleConfig:
    """The samples that a run writes while it trains."""

    prompts: tuple[str, ...] = PROMPTS  # each block of samples draws from these at random
    texts: int = 10  # samples at a time
    tokens: int = 60  # of each sample
    temperature: float = 0.8  # 0: greedy
    top_k: int = 50  # sample from the k most likely tokens; 0: from all
    top_p: float = 1.0  # sample from the fewest tokens that have this probability together; 1: from all

    def __post_init__(self):
        _require(len(self.prompts) >= 1, "sample.prompts is empty: give at least one prompt")
        for name in ("texts", "tokens"):
            _require(getattr(self, name) >= 1, f"sample.{name} is {getattr(self, name)}: it must be at least 1")
        _require(self.temperature >= 0, f"sample.temperature is {self.temperature}: it must not be negative")
        _require(0 <= self.top_k < 2**31, f"sample.top_k is {self.top_k}: it must not be negative (0 keeps all)")
        _require(0 < self.top_p <= 1, f"sample.top_p is {self.top_p}: it must be above 0 and at most 1")


@dataclass(frozen=True)
class Config:
    """One run. Steps are optimizer steps. An interval of n acts after steps n, 2n, 3n and so on."""

    batch_size: int = field(default=32, metadata=FIXED)  # sequences per micro-batch
    grad_accum_steps: int = field(default=2, metadata=FIXED)  # micro-batches per optimizer step
    microbatch_chunks: int = 0  # sequential parts of a micro-batch, which need less memory; 0: chosen for the device
    max_steps: int = 50_000  # optimizer steps of the whole run
    eval_interval: int = 100  # steps between evaluations, each with a line on the console
    save_interval: int = 300  # steps between checkpoints
    generation_interval: int = 50  # steps between blocks of samples
    max_checkpoints: int = 5  # checkpoints that are kept; older ones are deleted
    max_nonfinite_microbatches: int = 10  # consecutive micro-batches with non-finite gradients that stop the run
    seed: int = field(default=0, metadata=FIXED)  # random seed of the initial weights, the data order and the samples
    init_from: str = field(default="", metadata=FIXED)  # Hugging Face folder with the initial weights; empty: random
    platform: str = "auto"  # auto (the best that works), cpu, cuda, mps or metal
    deterministic: bool = False  # bitwise reproducible across sessions on an NVIDIA GPU, but slower
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    data: DataConfig = DataConfig()
    sample: SampleConfig = SampleConfig()

    def __post_init__(self):
        at_least_one = ("batch_size", "grad_accum_steps", "max_steps", "eval_interval", "save_interval")
        for name in (*at_least_one, "generation_interval", "max_checkpoints", "max_nonfinite_microbatches"):
            _require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}: it must be at least 1")
        _require(
            self.microbatch_chunks >= 0,
            f"microbatch_chunks is {self.microbatch_chunks}: it must not be negative (0 chooses)",
        )
        _require(
            self.microbatch_chunks == 0 or self.batch_size % self.microbatch_chunks == 0,
            f"batch_size {self.batch_size} is not divisible by microbatch_chunks {self.microbatch_chunks}:"
            " choose a divisor",
        )
        _require(
            257 <= self.model.vocab_size <= 50_257,
            f"model.vocab_size is {self.model.vocab_size}: the tokenizer (GPT-2's) has prefixes of 257 to 50257 tokens",
        )
        _require(0 <= self.seed < 2**31, f"seed is {self.seed}: it must be between 0 and 2147483647")
        _one_of("platform", self.platform, PLATFORMS)
        _require(
            self.optimizer.warmup_steps < self.max_steps,
            f"optimizer.warmup_steps {self.optimizer.warmup_steps} leaves nothing of max_steps {self.max_steps}:"
            " choose a shorter warm-up",
        )

    @property
    def chunk_size(self) -> int:
        """Sequences that are computed at once."""
        return self.batch_size // max(self.microbatch_chunks, 1)

    @property
    def tokens_per_step(self) -> int:
        """Tokens per optimizer step."""
        return self.batch_size * self.grad_accum_steps * self.model.context


def check_name(name: str) -> None:
    """Raises UsageError, which names the nearest setting, if there is no setting `name` (`group.name` in a group)."""
    kind: Any = Config
    if name in OLD_NAMES:
        raise UsageError(f"the setting {name} is called {OLD_NAMES[name]} now")
    parts = name.split(".")
    for depth, part in enumerate(parts):
        known = typing.get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
        above = "".join(f"{parent}." for parent in parts[:depth])
        _require(part in known, f"unknown setting {above}{part}: {_nearest(part, known)}see jaxlm/config.py")
        kind = known[part]


def default_config() -> ml_collections.ConfigDict:
    """All settings with their defaults, for a config file to change."""
    return ml_collections.ConfigDict(to_dict(Config()))


def to_dict(config: Config) -> dict[str, Any]:
    """The settings as nested dicts of plain values."""
    return dataclasses.asdict(config)


def from_config_dict(settings: Mapping[str, Any]) -> Config:
    """Checks all settings and builds the Config.

    Args:
        settings: nested mapping, such as a ConfigDict or parsed JSON. Missing settings get their defaults.

    Raises:
        UsageError: an unknown name (the message has the nearest), a wrong type, a value out of bounds.
    """
    _require(_is_group(settings), "get_config() of a config file must return a ConfigDict")
    return _build(Config, with_new_names(settings), "")


def with_new_names(settings: Mapping[str, Any], group: str = "") -> dict[str, Any]:
    """The settings as nested dicts, with the names and values of OLD_NAMES replaced.

    If a setting is given under both names, the old one wins, because the other may be a default.

    Args:
        settings: all settings, or those of one group.
        group: the group's name; empty for all settings.
    """
    renamed = {
        name: with_new_names(value, name) if not group and _is_group(value) else value
        for name, value in settings.items()
    }
    for old, new in OLD_NAMES.items():
        old_group, _, old_name = old.rpartition(".")
        if old_group == group and old_name in renamed:
            value = renamed.pop(old_name)
            if old in OLD_VALUES:
                _one_of(old, str(value), tuple(OLD_VALUES[old]))
                value = OLD_VALUES[old][str(value)]
            if value is not None:
                renamed[new.rpartition(".")[2]] = value
    return renamed


def _is_group(value: Any) -> bool:
    return isinstance(value, Mapping | ml_collections.ConfigDict)


def model_config(settings: Mapping[str, Any]) -> ModelConfig:
    """As `from_config_dict`, for a model alone. Its vocabulary need not be that of our tokenizer."""
    return _build(ModelConfig, settings, "model.")


def _build(cls: type, settings: Mapping[str, Any], prefix: str) -> Any:
    kinds = typing.get_type_hints(cls)
    arguments = {}
    for name, value in settings.items():
        check_name(prefix + name)
        _require(name in kinds, f"unknown setting {prefix}{name}: put it into its group")
        kind = kinds[name]
        if dataclasses.is_dataclass(kind):
            _require(_is_group(value), f"{prefix}{name} must be a group")
            arguments[name] = _build(typing.cast(type, kind), value, f"{prefix}{name}.")
        else:
            arguments[name] = _value(f"{prefix}{name}", kind, value)
    return cls(**arguments)


def _value(name: str, kind: Any, value: Any) -> Any:
    if kind == tuple[str, ...]:
        good = isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
        _require(good, f"{name} must be a list of strings")
        return tuple(value)
    if type(value) is int:
        _require(abs(value) < 2**31, f"{name} is an integer of more than 31 bits: choose a smaller one")
        value = float(value) if kind is float else value
    good = type(value) is kind and (kind is not float or math.isfinite(value))
    described = {int: "an integer", float: "a number", bool: "True or False", str: "a string"}
    _require(good, f"{name} is {value!r:.100}: it must be {described[kind]}")
    return value


def differences(saved: Mapping[str, Any], config: Config) -> list[str]:
    """The FIXED settings that differ between a saved run (nested dict) and `config`, one phrase each.

    Raises:
        UsageError: `saved` is not a mapping of settings.
    """
    _require(isinstance(saved, Mapping), "the saved settings are damaged: config must be a group")
    return _differences(with_new_names(saved), config, "")


def _differences(saved: Mapping[str, Any], config: Any, prefix: str) -> list[str]:
    _require(isinstance(saved, Mapping), f"the saved settings are damaged: {prefix[:-1] or 'config'} must be a group")
    phrases = []
    for setting in dataclasses.fields(config):
        name, value = f"{prefix}{setting.name}", getattr(config, setting.name)
        if dataclasses.is_dataclass(value):
            phrases += _differences(saved.get(setting.name, {}), value, f"{name}.")
        elif setting.metadata.get("fixed"):
            saved_value = saved.get(setting.name, setting.default)
            if saved_value != value:
                phrases.append(f"{name} is {value}, the saved run has {saved_value}")
    return phrases
