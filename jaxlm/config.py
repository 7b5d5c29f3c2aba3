"""Every setting of a run: its name, its default, its bounds. The one home of each.

A config file builds an `ml_collections.ConfigDict` (from `default_config()`), flags override it, and
`from_config_dict` turns the result, once, into the frozen dataclasses that the rest of the program takes.
Settings marked `FIXED` decide what the numbers of a checkpoint mean: a run cannot go on with another value.
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

# settings with another name in old checkpoints and config files; where several became one, the last that is set wins
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
OLD_VALUES = {  # and their values; DROPPED: all others leave the default
    "model.dtype": {"bfloat16": "bf16", "mixed": "bf16_matmul"},
    "model.attention": {"cudnn": "cuda"},
    "model.kernels": {"fused": "hopper"},
    "model.loops": {"unrolled": "apple"},
}
DROPPED = ("model.attention", "model.kernels", "model.loops")

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

    vocab_size: int = field(default=50_257, metadata=FIXED)
    context: int = field(default=1024, metadata=FIXED)  # tokens
    layers: int = field(default=8, metadata=FIXED)
    heads: int = field(default=8, metadata=FIXED)
    kv_heads: int = field(default=0, metadata=FIXED)  # heads of keys and values, shared by the queries'; 0: as many
    width: int = field(default=512, metadata=FIXED)
    mlp_width: int = field(default=2048, metadata=FIXED)
    rope_theta: float = field(default=10_000.0, metadata=FIXED)
    norm_eps: float = field(default=1e-6, metadata=FIXED)
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

    name: str = field(default="adamw", metadata=FIXED)
    learning_rate: float = 3e-4  # peak
    muon_learning_rate: float = 6e-3  # peak, of the matrices that Muon updates
    warmup_steps: int = 100
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

    prompts: tuple[str, ...] = PROMPTS
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
    """One run. Steps are optimizer steps; an interval of n acts after steps n, 2n, 3n and so on."""

    batch_size: int = field(default=32, metadata=FIXED)  # sequences per micro-batch
    grad_accum_steps: int = field(default=2, metadata=FIXED)  # micro-batches per optimizer step
    microbatch_chunks: int = (
        0  # parts of a micro-batch, computed one after the other: less memory, the same numbers. 0: as fits
    )
    max_steps: int = 50_000
    eval_interval: int = 100  # a console line and a validation pass
    save_interval: int = 300
    generation_interval: int = 50
    max_checkpoints: int = 5
    max_nonfinite_microbatches: int = 10  # micro-batches with non-finite gradients in a row before the run stops
    seed: int = field(default=0, metadata=FIXED)
    init_from: str = field(default="", metadata=FIXED)  # a Hugging Face folder to begin with; empty: random weights
    platform: str = "auto"
    deterministic: bool = False  # on an NVIDIA GPU: the same bits in every session, slower
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
        """Sequences computed at one time."""
        return self.batch_size // max(self.microbatch_chunks, 1)

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step learns from."""
        return self.batch_size * self.grad_accum_steps * self.model.context


def check_name(name: str) -> None:
    """Raises UsageError, with the nearest known one, if no setting has this name (`group.name` in a group)."""
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
    """All settings at their defaults, for a config file to change."""
    return ml_collections.ConfigDict(to_dict(Config()))


def to_dict(config: Config) -> dict[str, Any]:
    """The settings as nested plain dicts (JSON-ready but for tuples)."""
    return dataclasses.asdict(config)


def from_config_dict(settings: Mapping[str, Any]) -> Config:
    """Checks every setting and freezes them.

    Args:
        settings: nested mapping (a ConfigDict, or JSON read back); what it leaves out keeps its default.

    Raises:
        UsageError: an unknown name (with the nearest known one), a wrong type, a value out of bounds.
    """
    _require(isinstance(settings, Mapping | ml_collections.ConfigDict), "get_config() of a config file must return one")
    return _build(Config, with_new_names(settings), "")


def with_new_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same nested settings as plain dicts, in which each of OLD_NAMES has its new name and value."""
    renamed: dict[str, Any] = {}
    old: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping | ml_collections.ConfigDict):
            group = {f"{name}.{inner}": inner_value for inner, inner_value in value.items()}
            old |= {inner: group.pop(inner) for inner in list(group) if inner in OLD_NAMES}
            renamed[name] = {inner.partition(".")[2]: inner_value for inner, inner_value in group.items()}
        elif name in OLD_NAMES:
            old[name] = value
        else:
            renamed[name] = value
    for name in (name for name in OLD_NAMES if name in old):
        value = OLD_VALUES.get(name, {}).get(old[name], None if name in DROPPED else old[name])
        group_name, _, inner = OLD_NAMES[name].rpartition(".")
        group = renamed[group_name] if group_name else renamed
        group |= {} if value is None else {inner: value}
    return renamed


def model_config(settings: Mapping[str, Any]) -> ModelConfig:
    """As `from_config_dict`, of a model alone, which may have another tokenizer than runs have."""
    return _build(ModelConfig, settings, "model.")


def _build(cls: type, settings: Mapping[str, Any], prefix: str) -> Any:
    kinds = typing.get_type_hints(cls)
    arguments = {}
    for name, value in settings.items():
        check_name(prefix + name)
        kind = kinds[name]
        if dataclasses.is_dataclass(kind):
            _require(isinstance(value, Mapping | ml_collections.ConfigDict), f"{prefix}{name} must be a group")
            arguments[name] = _build(typing.cast(type, kind), value, f"{prefix}{name}.")
        else:
            arguments[name] = _value(f"{prefix}{name}", kind, value)
    return cls(**arguments)


def _value(name: str, kind: Any, value: Any) -> Any:
    if kind == tuple[str, ...]:
        good = isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
        _require(good, f"{name} must be a list of texts")
        return tuple(value)
    if type(value) is int:
        _require(abs(value) < 2**31, f"{name} is a whole number of more than 31 bits: choose a smaller one")
        value = float(value) if kind is float else value
    good = type(value) is kind and (kind is not float or math.isfinite(value))
    described = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}
    _require(good, f"{name} is {value!r:.100}: it must be {described[kind]}")
    return value


def differences(saved: Mapping[str, Any], config: Config) -> list[str]:
    """The FIXED settings in which a saved run (nested dict) and `config` differ, one phrase each.

    Raises UsageError when `saved` does not hold settings.
    """
    _require(isinstance(saved, Mapping), "the saved settings are damaged: config must be a group")
    return _differences(with_new_names(saved), config, "")


def _differences(saved: Mapping[str, Any], config: Any, prefix: str) -> list[str]:
    _require(isinstance(saved, Mapping), f"the saved settings are damaged: {prefix[:-1] or 'config'} must be a group")
    found = []
    for setting in dataclasses.fields(config):
        value = getattr(config, setting.name)
        if dataclasses.is_dataclass(value):
            found += _differences(saved.get(setting.name, {}), value, f"{prefix}{setting.name}.")
        elif setting.metadata.get("fixed") and saved.get(setting.name, setting.default) != value:
            found.append(f"{prefix}{setting.name} is {value}, there it is {saved.get(setting.name, setting.default)}")
    return found
