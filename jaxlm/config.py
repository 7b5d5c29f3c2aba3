"""The settings of a run: names, defaults, meanings, bounds.

A config file returns an `ml_collections.ConfigDict` (from `default_config()`), flags override it, and
`from_config_dict` checks the result and builds the frozen dataclasses that the rest of the program takes.
`python -m jaxlm.main --show` and docs/configuration.md (`python -m experiments.document_config`) show the meanings.
"""

import dataclasses
import difflib
import operator
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import ml_collections

from jaxlm.errors import UsageError

INT32_MAX = 2**31 - 1
FLOAT32_MAX = 3.4028234e38
PLATFORMS = ("auto", "cpu", "cuda", "mps", "metal")
PRECISIONS = ("auto", "float32", "bf16", "bf16_matmul")
OPTIMIZERS = ("adamw", "muon")  # the functions are in core/optimizer.py
LR_SCHEDULES = ("cosine", "linear")  # likewise
IMPLEMENTATIONS = ("auto", "xla", "cpu", "cuda", "hopper", "apple")
SMALLEST_VOCABULARY = 257  # the 256 bytes and end-of-text
TOKENIZERS = {"gpt2": 50_257, "own": 65_536}  # and the largest vocabulary of each; an id has 16 bits

# Names of settings in old config files and checkpoints, and their present names. If several old names are of
# one setting, the last of them wins.
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

# Settings that Muon once shared with Adam, whose value they get in an old checkpoint of a run with Muon.
ONCE_SHARED = {
    "optimizer.muon_momentum": "optimizer.b1",
    "optimizer.muon_weight_decay": "optimizer.weight_decay",
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

_BOUNDS = {
    "low": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "high": ("at most", operator.le),
    "below": ("below", operator.lt),
}


def setting(
    default: Any,
    meaning: str,
    choices: Collection[str] = (),
    *,
    fixed: bool = False,
    paths: bool = False,
    several: bool = False,
    **bounds: float,
) -> Any:
    """Declares a setting.

    Args:
        default: its default.
        meaning: what it is for, in a few words.
        choices: all its values; empty: any.
        fixed: a run cannot resume with another value, because it defines what the checkpoint means
            or how the run began.
        paths: it names files; values that name the same files are equal.
        several: it is a string that also takes a list of paths, which `join_paths` joins.
        **bounds: `low` and `high` are the least and the largest value; `above` and `below` are themselves excluded.
    """
    metadata = {"meaning": meaning, "choices": choices, "fixed": fixed, "paths": paths, "bounds": bounds}
    metadata |= {"several": several}
    return dataclasses.field(default=default, metadata=metadata)


def check_values(group: Any, prefix: str) -> None:
    """Raises UsageError if a value is not one of the choices or out of the bounds that its `setting` declares."""
    for field in dataclasses.fields(group):
        name, value = prefix + field.name, getattr(group, field.name)
        choices, bounds = field.metadata.get("choices"), field.metadata.get("bounds", {})
        if choices:
            _check_choice(name, value, choices)
        if not all(_BOUNDS[bound][1](value, limit) for bound, limit in bounds.items()):
            allowed = " and ".join(f"{_BOUNDS[bound][0]} {limit}" for bound, limit in bounds.items())
            raise UsageError(f"{name} is {value}: it must be {allowed}")


def _check_choice(name: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        raise UsageError(f"{name} is {value!r:.100}: {_nearest(value, choices)}it is one of {', '.join(choices)}")


def _nearest(name: str, names: Collection[str]) -> str:
    match = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {match[0]}? " if match else ""


@dataclass(frozen=True)
class ModelConfig:
    """The decoder: sizes, initialisation and how it is computed."""

    vocab_size: int = setting(50_257, "tokens of the vocabulary", low=1, fixed=True)
    context: int = setting(1024, "tokens in a sequence", low=1, fixed=True)
    layers: int = setting(8, "blocks, each of attention and an MLP", low=1, fixed=True)
    heads: int = setting(8, "attention heads, each of width / heads numbers", low=1, fixed=True)
    kv_heads: int = setting(0, "heads of keys and values, shared by the queries'; 0: as many", low=0, fixed=True)
    width: int = setting(512, "numbers per position in the residual stream", low=1, fixed=True)
    mlp_width: int = setting(2048, "numbers per position inside the MLP", low=1, fixed=True)
    rope_theta: float = setting(10_000.0, "base of RoPE's frequencies", above=0, fixed=True)
    norm_eps: float = setting(1e-6, "RMSNorm adds it to the mean square", above=0, fixed=True)
    qk_norm: bool = setting(False, "RMSNorm of each head's queries and keys before RoPE, as in Qwen3", fixed=True)
    tied: bool = setting(True, "the head reads the input embedding; False: one of its own", fixed=True)
    output_init: str = setting("scaled", "output matrices; scaled: 0.02/sqrt(2 layers)", ("scaled", "zero"), fixed=True)
    precision: str = setting("auto", "float32, bf16 (mixed precision) or bf16_matmul; weights are float32", PRECISIONS)
    implementation: str = setting("auto", "xla (plain JAX), cpu, cuda, hopper (H100, H200) or apple", IMPLEMENTATIONS)
    remat: bool | None = setting(None, "recompute blocks backward: less memory, a sixth more work. None: if needed")

    def __post_init__(self):
        check_values(self, "model.")
        if self.width % (2 * self.heads):
            raise UsageError(
                f"model.width {self.width} does not divide into {self.heads} heads of an even size (RoPE rotates"
                f" pairs): choose a multiple of {2 * self.heads}"
            )
        if self.heads % (self.kv_heads or self.heads):
            raise UsageError(f"model.kv_heads is {self.kv_heads}: it must divide the {self.heads} heads (0: as many)")

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

    name: str = setting("adamw", "adamw, or muon: Muon on the matrices of the blocks", OPTIMIZERS, fixed=True)
    learning_rate: float = setting(3e-4, "peak", above=0)
    muon_learning_rate: float = setting(6e-3, "peak, of the matrices that Muon updates", above=0)
    warmup_steps: int = setting(100, "optimizer steps over which the learning rate rises to its peak", low=0)
    lr_schedule: str = setting("cosine", "how the learning rate falls: cosine or linear", LR_SCHEDULES)
    lr_decay_fraction: float = setting(1.0, "the fall takes this last part of the steps after warm-up", low=0, high=1)
    min_lr_ratio: float = setting(0.1, "learning rate at max_steps, as a fraction of the peak", low=0, high=1)
    lr_restart_step: int = setting(0, "where a second schedule begins, to train a finished run longer; 0: none", low=0)
    lr_restart_ratio: float = setting(0.6, "peak of the second schedule, a fraction of the first's", above=0, high=1)
    b1: float = setting(0.9, "decay of Adam's first moment", low=0, below=1)
    b2: float = setting(0.95, "decay of Adam's second moment", low=0, below=1)
    weight_decay: float = setting(0.1, "decoupled; on all that Adam updates but norm scales", low=0)
    muon_momentum: float = setting(0.9, "decay of Muon's momentum, in Nesterov's form", low=0, below=1)
    muon_momentum_warmup: int = setting(0, "optimizer steps over which it rises from 0.85; 0: none", low=0)
    muon_b2: float = setting(0.0, "decay of NorMuon's second moment, a neuron; 0: none", low=0, below=1, fixed=True)
    muon_weight_decay: float = setting(0.1, "decoupled; on the matrices that Muon updates", low=0)
    cautious: bool = setting(False, "weight decay only where the update moves a weight towards zero")
    average: float = setting(0.0, "decay of the average of the weights; 0: none", low=0, high=0.99, fixed=True)
    clip_norm: float = setting(1.0, "the largest global norm of a gradient; a larger one is scaled down", above=0)

    def __post_init__(self):
        check_values(self, "optimizer.")
        if self.lr_restart_step and self.lr_restart_ratio < self.min_lr_ratio:
            raise UsageError(
                f"optimizer.lr_restart_ratio is {self.lr_restart_ratio}: it must be at least optimizer.min_lr_ratio,"
                f" {self.min_lr_ratio}"
            )


@dataclass(frozen=True)
class DataConfig:
    """The corpus, its token files and the validation split."""

    corpus: str = setting("novels", "a name, or a list of files, folders and patterns", paths=True, several=True)
    exclude: tuple[str, ...] = setting((), "patterns of files and folders of the corpus that are not read")
    dir: str = setting("", "directory of prepared train.bin and val.bin; empty: one under data/", paths=True)
    tokenizer: str = setting("gpt2", "gpt2 (its first tokens), or own: learnt from the corpus", TOKENIZERS, fixed=True)
    val_fraction: float = setting(0.01, "of the text, held out for validation", above=0, below=1, fixed=True)
    eval_sequences: int = setting(64, "of `context` tokens, per evaluation, evenly spaced; 0: the whole text", low=0)

    def __post_init__(self):
        check_values(self, "data.")
        if not self.corpus and not self.dir:
            raise UsageError("data.corpus and data.dir are both empty: name your text with --config.data.corpus")


@dataclass(frozen=True)
class SampleConfig:
    """The samples that a run writes while it trains."""

    prompts: tuple[str, ...] = setting(PROMPTS, "samples draw from these; none: beginnings of the validation text")
    texts: int = setting(10, "samples at a time", low=1)
    tokens: int = setting(60, "of each sample", low=1)
    temperature: float = setting(0.8, "0: greedy", low=0, high=1_000_000)
    top_k: int = setting(50, "sample from the k most likely tokens; 0: from all", low=0, high=INT32_MAX)
    top_p: float = setting(1.0, "sample from the fewest tokens of this probability together; 1: all", above=0, high=1)

    def __post_init__(self):
        check_values(self, "sample.")


@dataclass(frozen=True)
class MeshConfig:
    """How a run is spread over the devices of one kind: data groups of fsdp devices. Both split each micro-batch."""

    data: int = setting(-1, "groups of devices, each with the whole model; -1: as many as there are", low=-1)
    fsdp: int = setting(1, "devices of a group; each holds its part of the parameters and of all like them", low=1)

    def __post_init__(self):
        check_values(self, "mesh.")
        if not self.data:
            raise UsageError("mesh.data is 0: it must be at least 1, or -1 for as many as there are")

    @property
    def devices(self) -> int:
        """How many devices there are in all; with `data` -1 those of one group."""
        return abs(self.data) * self.fsdp


@dataclass(frozen=True)
class Config:
    """One run. Steps are optimizer steps. An interval of n acts after steps n, 2n, 3n and so on."""

    batch_size: int = setting(32, "sequences per micro-batch", low=1, fixed=True)
    grad_accum_steps: int = setting(2, "micro-batches per optimizer step", low=1, fixed=True)
    microbatch_chunks: int = setting(0, "sequential parts of a micro-batch, to save memory; 0: automatic", low=0)
    hours: float = setting(0.0, "of training; they and the text choose the sizes. 0: they do not", low=0, fixed=True)
    max_steps: int = setting(50_000, "optimizer steps of the whole run", low=1)
    eval_interval: int = setting(100, "steps between evaluations, each with a line on the console", low=1)
    save_interval: int = setting(300, "steps between checkpoints", low=1)
    save_minutes: float = setting(30.0, "minutes from a save to a rolling checkpoint; 0: never", low=0)
    generation_interval: int = setting(50, "steps between blocks of samples", low=1)
    max_checkpoints: int = setting(5, "regular checkpoints that are kept; older ones are deleted", low=1)
    keep_every: int = setting(0, "steps between checkpoints that are never deleted; 0: none", low=0)
    keep_best: bool = setting(False, "keep the step of the lowest validation loss; the final model is made of it")
    max_nonfinite_microbatches: int = setting(10, "non-finite micro-batches in a row that stop the run", low=1)
    seed: int = setting(0, "of the initial weights, the data order and the samples", low=0, high=INT32_MAX, fixed=True)
    init_from: str = setting("", "Hugging Face folder with the initial weights; empty: random", fixed=True, paths=True)
    platform: str = setting("auto", "auto (the best that works), cpu, cuda, mps or metal", PLATFORMS)
    deterministic: bool = setting(False, "bitwise reproducible across sessions on an NVIDIA GPU, but slower")
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    data: DataConfig = DataConfig()
    sample: SampleConfig = SampleConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        check_values(self, "")
        if self.batch_size % (self.microbatch_chunks or 1):
            raise UsageError(
                f"batch_size {self.batch_size} is not divisible by microbatch_chunks {self.microbatch_chunks}:"
                " choose a divisor"
            )
        if self.keep_every % self.save_interval:
            raise UsageError(
                f"keep_every {self.keep_every} is no multiple of save_interval {self.save_interval}: choose one, or 0"
            )
        if self.keep_best and self.data.eval_sequences:
            raise UsageError("keep_best compares losses of the whole validation text: set data.eval_sequences to 0")
        check_vocab_size(self.data.tokenizer, self.model.vocab_size, "model.vocab_size")
        warmup, restart = self.optimizer.warmup_steps, self.optimizer.lr_restart_step
        if warmup >= self.max_steps:
            raise UsageError(
                f"optimizer.warmup_steps {warmup} leaves nothing of max_steps {self.max_steps}:"
                " choose a shorter warm-up"
            )
        if restart and not warmup < restart < self.max_steps - warmup:
            raise UsageError(
                f"optimizer.lr_restart_step {restart} leaves no steps after the warm-up of {warmup} steps before or"
                f" after it: choose more max_steps than {self.max_steps}, or a step from {warmup + 1} to"
                f" {self.max_steps - warmup - 1}"
            )

    @property
    def chunk_size(self) -> int:
        """Sequences that are computed at once, by all devices."""
        return self.batch_size // max(self.microbatch_chunks, 1)

    @property
    def tokens_per_step(self) -> int:
        """Tokens per optimizer step."""
        return self.batch_size * self.grad_accum_steps * self.model.context


def check_vocab_size(tokenizer: str, vocab_size: int, name: str) -> None:
    """Raises UsageError, which names the setting or flag, if this tokenizer cannot have so many tokens."""
    largest = TOKENIZERS[tokenizer]
    if not SMALLEST_VOCABULARY <= vocab_size <= largest:
        raise UsageError(
            f"{name} is {vocab_size}: choose {SMALLEST_VOCABULARY} to {largest} for the tokenizer {tokenizer}"
        )


def check_name(name: str) -> None:
    """Raises UsageError, which names the nearest setting, if there is no setting `name` (`group.name` in a group)."""
    if name in OLD_NAMES:
        raise UsageError(f"the setting {name} is called {OLD_NAMES[name]} now")
    types, above = _types(Config), ""
    for part in name.split("."):
        if part not in types:
            raise UsageError(f"unknown setting {above}{part}: {_nearest(part, types)}jaxlm.main --show prints all")
        types, above = _types(types[part]), f"{above}{part}."


def _types(kind: Any) -> dict[str, Any]:
    """The type of each setting of a group; nothing for other types."""
    return {field.name: field.type for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else {}


class Setting(NamedTuple):
    """A setting of a run."""

    name: str  # with its group
    value: Any
    default: Any
    meaning: str
    fixed: bool


def groups(config: Config) -> dict[str, Any]:
    """The groups of settings by the prefix of their names, which is empty for the settings in no group."""
    inner = {f"{field.name}.": getattr(config, field.name) for field in dataclasses.fields(config)}
    return {"": config} | {prefix: group for prefix, group in inner.items() if dataclasses.is_dataclass(group)}


def settings_of(group: Any, prefix: str) -> Iterator[Setting]:
    """The settings of a group."""
    for field in dataclasses.fields(group):
        if data := field.metadata:
            value = getattr(group, field.name)
            yield Setting(prefix + field.name, value, field.default, data["meaning"], data["fixed"])


def default_config() -> ml_collections.ConfigDict:
    """All settings with their defaults, for a config file to change."""
    settings = to_dict(Config())
    corpus = settings["data"]["corpus"]
    settings["data"]["corpus"] = ml_collections.FieldReference(corpus, field_type=(str, tuple, list))
    settings["model"]["remat"] = ml_collections.FieldReference(settings["model"]["remat"], field_type=bool)
    return ml_collections.ConfigDict(settings)


def to_dict(config: Config) -> dict[str, Any]:
    """The settings as nested dicts of plain values."""
    return dataclasses.asdict(config)


def from_config_dict(settings: ml_collections.ConfigDict | Mapping[str, Any]) -> Config:
    """Checks all settings and builds the Config.

    Args:
        settings: nested settings, such as a ConfigDict or parsed JSON. Missing ones get their defaults.

    Raises UsageError for an unknown name (the message has the nearest), a wrong type or a value out of bounds.
    """
    if isinstance(settings, ml_collections.ConfigDict):
        settings = settings.to_dict()
    if not isinstance(settings, Mapping):
        raise UsageError("get_config() of a config file must return a ConfigDict")
    return _build(Config, settings)


def model_config(settings: Mapping[str, Any]) -> ModelConfig:
    """As `from_config_dict`, for a model alone. Its vocabulary need not be that of jaxlm's tokenizer."""
    return _build(ModelConfig, settings, "model")


def _build(cls: Any, settings: Mapping[str, Any], group: str = "") -> Any:
    types, prefix = _types(cls), group and f"{group}."
    several = [field.name for field in dataclasses.fields(cls) if field.metadata.get("several")]
    arguments = {}
    for name, value in _with_new_names(settings, group).items():
        if name not in types:
            check_name(prefix + name)
            raise UsageError(f"unknown setting {name}: put it into its group")
        if name in several and isinstance(value, list | tuple):
            arguments[name] = join_paths(_converted(prefix + name, tuple[str, ...], value))
        elif not dataclasses.is_dataclass(types[name]):
            arguments[name] = _converted(prefix + name, types[name], value)
        elif isinstance(value, Mapping):
            arguments[name] = _build(types[name], value, name)
        else:
            raise UsageError(f"{name} must be a group")
    return cls(**arguments)


def _with_new_names(settings: Mapping[str, Any], group: str) -> dict[str, Any]:
    """The settings of a group ("" is the outermost), with the names and values of OLD_NAMES and ONCE_SHARED replaced.

    If a setting is given under both names, the old one wins, because the other may be a default.
    """
    renamed = dict(settings)
    for old, new in OLD_NAMES.items():
        old_group, _, old_name = old.rpartition(".")
        if old_group == group and old_name in renamed:
            value = renamed.pop(old_name)
            if old in OLD_VALUES:
                if not isinstance(value, str):
                    raise UsageError(f"{old} must be a string")
                _check_choice(old, value, OLD_VALUES[old])
                value = OLD_VALUES[old][value]
            if value is not None:
                renamed[new.rpartition(".")[2]] = value
    for new, old in ONCE_SHARED.items() if renamed.get("name") == "muon" else ():
        (new_group, _, new_name), old_name = new.rpartition("."), old.rpartition(".")[2]
        if new_group == group and new_name not in renamed and old_name in renamed:
            renamed[new_name] = renamed[old_name]
    return renamed


def _converted(name: str, kind: Any, value: Any) -> Any:
    """The value as `kind`, which also takes an integer as a float and a list as a tuple. Raises UsageError."""
    if kind == bool | None:
        return value if value is None else _converted(name, bool, value)
    if kind == tuple[str, ...]:
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise UsageError(f"{name} must be a list of strings")
        return tuple(value)
    if type(value) is int:
        if abs(value) > INT32_MAX:
            raise UsageError(f"{name} is an integer of more than 31 bits: choose a smaller one")
        value = float(value) if kind is float else value
    if type(value) is not kind or (kind is float and not abs(value) <= FLOAT32_MAX):
        described = {int: "an integer", float: "a number that float32 holds", bool: "True or False", str: "a string"}
        raise UsageError(f"{name} is {value!r:.100}: it must be {described[kind]}")
    return value


def join_paths(names: Sequence[str]) -> str:
    """One string for several paths and patterns, between commas. A path that exists gets a backslash before its own."""
    if len(names) == 1:
        return names[0]
    separator = ", " if os.path.exists(",".join(names)) else ","
    return separator.join(name.replace(",", r"\,") if os.path.exists(name) else name for name in names)


class Difference(NamedTuple):
    """A setting that differs between a saved run and this one."""

    name: str
    value: Any
    saved: Any
    fixed: bool


def differences(saved: Any, config: Any, group: str = "") -> list[Difference]:
    """The settings that differ between a saved run and this one.

    Args:
        saved: the saved settings as nested dicts.
        config: the settings of this run, or a group of them, which `group` names.

    Raises UsageError if `saved` is not a mapping of settings.
    """
    if not isinstance(saved, Mapping):
        raise UsageError(f"the saved settings are damaged: {group or 'config'} must be a group")
    saved, prefix, changes = _with_new_names(saved, group), group and f"{group}.", []
    for field in dataclasses.fields(config):
        value, metadata = getattr(config, field.name), field.metadata
        if dataclasses.is_dataclass(value):
            changes += differences(saved.get(field.name, {}), value, field.name)
            continue
        saved_value = saved.get(field.name, field.default)
        equal = same_paths if metadata.get("paths") else operator.eq
        saved_value = tuple(saved_value) if isinstance(saved_value, list) else saved_value
        if not equal(saved_value, value):
            changes.append(Difference(prefix + field.name, value, saved_value, metadata.get("fixed", False)))
    return changes


def same_paths(first: Any, second: Any) -> bool:
    """Whether two values of a setting name the same files in the same order, also by other paths or links."""
    if first == second or not (first and second):
        return bool(first == second)
    try:
        real, other = ([os.path.realpath(path.strip()) for path in value.split(",")] for value in (first, second))
    except (AttributeError, ValueError):  # a damaged file may hold anything
        return False
    return real == other
