"""The sizes and the steps of a run on a person's own text, from its bytes and the hours that the run may take."""

import bisect
import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxlm.config import Config, ModelConfig, from_config_dict, to_dict
from jaxlm.data.corpus import open_corpus
from jaxlm.data.split import measure as measure_text
from jaxlm.device import backend
from jaxlm.errors import RunError, UsageError
from jaxlm.interop.huggingface import read_sizes
from jaxlm.planner import estimate, measure
from jaxlm.planner.measure import BenchmarkResult
from jaxlm.planner.memory import cached_benchmark
from jaxlm.planner.report import run_benchmark, store_benchmark
from jaxlm.run.workdir import existing_parent, saved_settings

BYTES_PER_TOKEN = 3.0  # of the vocabularies below, about
PARAMETERS_PER_TOKEN = 64.0  # of the blocks, for each token of the text; at most
TOKENS_PER_PARAMETER = 2.0  # that the machine must be able to read in the time
EPOCHS = 5.0  # at most
PROCESS_BYTES = 10**9  # beside the arrays
TIME_SHARE = 0.95  # the rest is for heat and other programs
LEAST_STEPS = 40  # more than the warm-up

# the settings that are chosen; a flag that names one replaces the choice
CHOSEN = (
    *("batch_size", "max_steps", "eval_interval", "save_interval", "generation_interval"),
    *(f"model.{name}" for name in ("vocab_size", "context", "layers", "heads", "width", "mlp_width")),
    *(f"optimizer.{name}" for name in ("learning_rate", "muon_learning_rate")),
    "data.val_fraction",
)


class Sizes(NamedTuple):
    """A model and its batch, with rates; the last has those of m2_60m_fast."""

    layers: int
    width: int
    context: int
    batch_size: int
    learning_rate: float
    muon_learning_rate: float

    @property
    def parameters(self) -> int:
        """Of the blocks' matrices, with an MLP of three times the width."""
        return 13 * self.layers * self.width**2

    @property
    def memory(self) -> int:
        """Bytes that a run takes at most, with the largest vocabulary."""
        weights = 32 * (self.parameters + self.width * VOCABULARIES[-1])  # moments, gradients and a save's copy too
        tokens = max(self.context, backend.CHUNK_TOKENS)
        return PROCESS_BYTES + weights + 4 * tokens * (40 * self.layers * self.width + 4 * VOCABULARIES[-1])


VOCABULARIES = (512, 1024, 2048, 4096, 8192)
LADDER = (
    Sizes(2, 64, 128, 16, 1e-2, 6.5e-3),
    Sizes(3, 128, 256, 8, 1e-2, 6.5e-3),
    Sizes(4, 192, 256, 16, 1e-2, 5e-3),
    Sizes(6, 256, 256, 16, 1e-2, 4e-3),
    Sizes(6, 384, 512, 16, 1.1e-2, 3e-3),
    Sizes(8, 512, 1024, 16, 1.2e-2, 2.2e-3),
)


def choose_sizes(text_bytes: int, flops: float, memory: int) -> Sizes:
    """The largest model of LADDER for a text and a machine; the smallest, if none fits.

    The parameters of its blocks are at most PARAMETERS_PER_TOKEN for each token of the text. In the time, the machine
    trains it on TOKENS_PER_PARAMETER tokens a parameter. And it fits the memory. So more text, time or memory never
    give a smaller model.

    Hoffmann et al. 2022 (arXiv 2203.15556) find 20 tokens a parameter where each token is new. A person's text is read
    again: up to about 4 epochs are as good as new text, and beyond 16 there is little gain (Muennighoff et al. 2023,
    arXiv 2305.16264). The smaller the text, the earlier a model knows it by heart: docs/learning.md has what was
    measured for these constants.

    Args:
        text_bytes: of the whole text.
        flops: floating-point operations that the machine does in the time.
        memory: bytes.
    """
    most = PARAMETERS_PER_TOKEN * text_bytes / BYTES_PER_TOKEN
    fitting = [
        sizes
        for sizes in LADDER
        if sizes.parameters <= most
        and 6 * TOKENS_PER_PARAMETER * sizes.parameters**2 <= flops
        and sizes.memory <= memory
    ]
    return fitting[-1] if fitting else LADDER[0]


def choose_vocabulary(text_bytes: int) -> int:
    """The largest of VOCABULARIES that is at most twice the root of the bytes, so that its tokens occur often."""
    return VOCABULARIES[max(bisect.bisect_right(VOCABULARIES, 2 * math.sqrt(text_bytes)) - 1, 0)]


def with_sizes(config: Config, text_bytes: int, sizes: Sizes, steps: int, named: Collection[str] = ()) -> Config:
    """The config with all settings of CHOSEN but those that are named.

    The validation text is a tenth of the text, and at most 200 kB.
    """
    model = dataclasses.replace(
        config.model,
        vocab_size=_start(config).vocab_size if config.init_from else choose_vocabulary(text_bytes),
        context=sizes.context,
        layers=sizes.layers,
        heads=sizes.width // 64,
        width=sizes.width,
        mlp_width=3 * sizes.width,
    )
    chosen = dataclasses.replace(
        config,
        batch_size=sizes.batch_size,
        max_steps=steps,
        eval_interval=max(steps // 40, 1),
        save_interval=max(steps // 10, 1),
        generation_interval=max(steps // 10, 1),
        model=model,
        optimizer=dataclasses.replace(
            config.optimizer, learning_rate=sizes.learning_rate, muon_learning_rate=sizes.muon_learning_rate
        ),
        data=dataclasses.replace(config.data, val_fraction=min(0.1, 2e5 / text_bytes)),
    )
    return _replaced(config, named, to_dict(chosen))


def most_steps(config: Config, text_bytes: int) -> int:
    """The steps after which the training text was read EPOCHS times."""
    tokens = text_bytes * (1 - config.data.val_fraction) / BYTES_PER_TOKEN
    return max(round(EPOCHS * tokens / config.tokens_per_step), LEAST_STEPS)


def resolve(config: Config, workdir: Path, named: Collection[str], say: Callable[[str], None]) -> Config:
    """The config with the sizes that `hours` chooses, or chose when the run in `workdir` began; as it is without hours.

    Args:
        config: as a person gave it.
        workdir: of the run; it need not exist.
        named: the settings that a flag names, which are not replaced.
        say: receives a line on what is measured, and one on what is chosen.

    Raises:
        UsageError: `hours` is not that of the run, or the text cannot be read.
        RunError: the short run that measures the speed fails.
    """
    if not config.hours:
        return config
    saved = saved_settings(workdir)
    if not isinstance(saved, Mapping) or not saved.get("hours"):
        return _choose(config, workdir, named, say) if saved is None else config
    if saved["hours"] != config.hours:
        steps = saved.get("max_steps", 0)
        raise UsageError(
            f"hours is {config.hours:g}, and {workdir} began with {saved['hours']:g}, which chose its sizes: keep that;"
            f" to train it longer, add --config.max_steps={steps + steps // 2}"
            f" --config.optimizer.lr_restart_step={steps}"
        )
    return _replaced(config, named, saved)


def _replaced(config: Config, named: Collection[str], source: Mapping[str, Any]) -> Config:
    """The config with the settings of CHOSEN from `source`, but for those that are named."""
    settings = to_dict(config)
    for name in set(CHOSEN) - set(named):
        group, _, last = name.rpartition(".")
        (settings[group] if group else settings)[last] = (source[group] if group else source)[last]
    return from_config_dict(settings)


def _choose(config: Config, workdir: Path, named: Collection[str], say: Callable[[str], None]) -> Config:
    """Measures the text and the speed of the machine, and chooses."""
    if config.data.dir:
        raise UsageError("hours chooses the vocabulary for the text: set data.corpus, not data.dir")
    text_bytes = measure_text(open_corpus(config.data.corpus, config.data.exclude), lambda done: None).bytes
    device = backend.start(config.platform, config.deterministic)
    memory, seconds = backend.available_memory(device), TIME_SHARE * 3600 * config.hours
    dtype = backend.resolve(config.model, device).matmul_dtype
    speed = measure.EXPECTED_SHARE * measure.matmul_speed(dtype, device)
    tried: Sizes | None = None
    while (sizes := _fixed_sizes(config) or choose_sizes(text_bytes, seconds * speed, memory)) != tried:
        tried = sizes
        chosen = with_sizes(config, text_bytes, sizes, LEAST_STEPS, named)
        chosen = with_sizes(config, text_bytes, sizes, most_steps(chosen, text_bytes), named)
        resolved = backend.resolve_run(chosen, device)
        benchmark = _benchmark(resolved, device, workdir, say)
        step = measure.seconds(resolved, benchmark, 0).step
        speed = min(speed, chosen.tokens_per_step * estimate.flops_per_token(chosen.model) / step)
    most = chosen.max_steps
    windows = math.ceil(text_bytes * chosen.data.val_fraction / BYTES_PER_TOKEN / chosen.model.context)

    def takes(steps: int) -> float:
        run = with_sizes(config, text_bytes, sizes, steps, named)
        timings = measure.seconds(backend.resolve_run(run, device), benchmark, windows)
        return estimate.seconds_at(run, timings, steps)

    possible = range(min(LEAST_STEPS, most), most + 1)  # a flag may set fewer
    steps = possible[max(bisect.bisect_right(possible, seconds, key=takes) - 1, 0)]
    chosen = with_sizes(config, text_bytes, sizes, steps, named)
    store_benchmark(backend.resolve_run(chosen, device), device, benchmark)
    why = f"as about {EPOCHS:g} epochs are the most that help" if steps >= most else "as many as the time allows"
    why = "as the flag says" if "max_steps" in named else why
    text = f"{text_bytes / 1e6:.3g} MB of text and hours={config.hours:g}"
    say(f"For {text}: {_describe(chosen)}, {steps:,} steps, {why}")
    return chosen


def _start(config: Config) -> ModelConfig:
    return read_sizes(Path(config.init_from))


def _fixed_sizes(config: Config) -> Sizes | None:
    """The sizes of the model in `init_from`. Raises UsageError if they are not of LADDER."""
    if not config.init_from:
        return None
    model = _start(config)
    for sizes in LADDER:
        if (sizes.layers, sizes.width, sizes.context) == (model.layers, model.width, model.context):
            return sizes
    raise UsageError(f"{config.init_from} has other sizes than hours choose: set hours=0, its sizes and max_steps")


def _benchmark(config: Config, device: jax.Device, workdir: Path, say: Callable[[str], None]) -> BenchmarkResult:
    """What a plan or an earlier choice measured for a resolved config, or a short run does."""
    if cached := cached_benchmark(config, device):
        return cached
    say(f"Measuring the speed of {_describe(config)} by a short run, which takes a minute or more")
    benchmark, problem, _ = run_benchmark(config, device, existing_parent(workdir), lambda what, share: None)
    if benchmark is None:
        raise RunError(f"the speed of this machine cannot be measured: {problem}")
    return benchmark


def _describe(config: Config) -> str:
    model = config.model
    return f"a model of {model.layers} layers of width {model.width} with {model.vocab_size:,} tokens"
