"""Writes the lowered text of what a run computes, for every kind of device, so that two versions can be compared.

    python -m experiments.lowered --out before
    python -m experiments.lowered --out after --compare before

For the 60M preset and the quickstart it lowers the parameters' drawing, the training step, the evaluation, the prefill
and the decode, as a CPU, an NVIDIA GPU, a Hopper GPU and the two plugins of an Apple GPU would be given them. Nothing
is compiled or computed. Names of functions are replaced by numbers, and long constants by their hashes, so a renamed
function changes no text. With `--compare` it ends with 1 when a text differs. (A fused kernel of Hopper GPUs is
written as its jaxpr: its lowered form holds line numbers of the source.)
"""

import argparse
import contextlib
import difflib
import hashlib
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import numpy as np

from configs import m2_60m, quickstart
from jaxlm.config import Config, from_config_dict
from jaxlm.core.decoder import init_params
from jaxlm.core.generate import PROMPT_BUCKET
from jaxlm.core.model import prepare_decode_params
from jaxlm.core.sampling import _decode_on_device, decode_step, prefill, sampling_params
from jaxlm.core.train_step import init_state, make_eval_step, make_train_step
from jaxlm.device import backend

CONFIGS = {"m2_60m": m2_60m, "quickstart": quickstart}
# jax's name for the platform, and what the device says of itself
FORMS = {
    "cpu": ("cpu", {}),
    "cuda": ("gpu", {"compute_capability": "8.0"}),
    "hopper": ("gpu", {"compute_capability": "9.0"}),
    "METAL": ("METAL", {}),
    "mps": ("mps", {}),
}


@contextlib.contextmanager
def as_if_on(platform: str) -> Iterator[None]:
    """Makes jax believe that cuDNN and a GPU for it are present."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    with contextlib.ExitStack() as stack:
        if platform == "gpu":
            stack.enter_context(mock.patch.object(cudnn, "check_cudnn_version", lambda: 91_000))
            stack.enter_context(mock.patch.object(cudnn, "check_compute_capability", lambda *_: True))
        yield


def programs(config: Config) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """The name, the jitted function and the arguments or their shapes of each program of a run."""
    ids = jax.ShapeDtypeStruct((config.batch_size, config.model.context + 1), np.int32)
    some = jax.ShapeDtypeStruct((config.chunk_size, config.model.context), np.int32)
    state = jax.eval_shape(lambda: init_state(config))
    step: Any = make_train_step(config)
    model, B, new = config.model, config.sample.texts, config.sample.tokens
    yield "init", init_params, (model, jax.eval_shape(lambda: jax.random.key(0)))
    if hasattr(step, "start"):
        accumulator = jax.eval_shape(step.start, state.params)
        yield "train_start", step.start, (state.params,)
        yield "train_chunk", step.accumulate_chunk, (state.params, accumulator, ids)
        yield "train_update", step.update, (state, accumulator)
    else:
        yield "train_step", step, (state, ids)
    yield "evaluation", make_eval_step(config), (state.params, some, some)
    weights = jax.eval_shape(lambda params: prepare_decode_params(model, params), state.params)
    prompts = [
        jax.ShapeDtypeStruct(shape, kind)
        for shape, kind in (((B, PROMPT_BUCKET), np.int32), ((B,), np.int32), ((B, 2), np.uint32))
    ]
    texts = jax.eval_shape(lambda *a: prefill(model, *a, new), weights, *prompts)
    choice = sampling_params(config.sample)
    yield "decode_params", prepare_decode_params, (model, state.params)
    yield "prefill", prefill, (model, weights, *prompts, new)
    yield "decode_step", decode_step, (model, weights, texts, choice, np.int32(0))
    if not hasattr(step, "start"):
        yield "decode", _decode_on_device, (model, weights, texts, choice, np.int32(0), new)


def lowered(function: Any, arguments: tuple[Any, ...], platform: str) -> str:
    """The text of a program as a platform is given it; the jaxpr where it holds a kernel of our own."""
    traced = function.trace(*arguments)
    if "wgmma" in (jaxpr := str(traced.jaxpr)):
        text = re.sub(r"(?m) at 0x[0-9a-f]+|/\S+\.py:\d+|(name|fwd|bwd)=\S+|debug_info=.*", "", jaxpr)
        numbers = {name: f"f{i}" for i, name in enumerate(re.findall(r"(?m)^\s*let ([A-Za-z_]\w*) = \{", text))}
        words = re.sub(r"([][])", r" \1 ", re.sub(r"[A-Za-z_]\w*", lambda m: numbers.get(m[0], m[0]), text)).split()
        return "\n".join(words)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")
        text = traced.lower(lowering_platforms=("cuda" if platform == "gpu" else platform,)).as_text()
    return without_names(text)


def without_names(text: str) -> str:
    """StableHLO with functions numbered in the order of their first use, and hashes in place of long constants."""
    text = re.sub(r' ?\{?jax\.result_info = "[^"]*"\}?,? ?', "", text)
    text = re.sub(r'"0x[0-9A-F]{64,}"', lambda m: hashlib.sha256(m[0].encode()).hexdigest(), text)
    defined = set(re.findall(r"func\.func \w* ?@([\w.]+)|module @([\w.]+)", text))
    names = {name for pair in defined for name in pair if name}
    numbers: dict[str, str] = {}
    return re.sub(
        r"@([\w.]+)",
        lambda m: "@" + numbers.setdefault(m[1], f"f{len(numbers)}") if m[1] in names else m[0],
        text,
    )


def write(out: Path) -> list[Path]:
    """Writes a file for each configuration, form and program below `out`."""
    files = []
    for config_name, module in CONFIGS.items():
        for form, (platform, device) in FORMS.items():
            if form == "hopper" and jax.__version_info__ < (0, 11):
                continue
            with as_if_on(platform):
                device: Any = SimpleNamespace(platform=platform, **device)
                config = backend.resolve_run(from_config_dict(module.get_config()), device)
                for program, function, arguments in programs(config):
                    file = out / f"{config_name}.{form}.{program}.txt"
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_text(lowered(function, arguments, platform) + "\n")
                    files.append(file)
            jax.clear_caches()
    return files


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the texts")
    parser.add_argument("--compare", type=Path, help="folder that an earlier version wrote")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    files = write(args.out)
    print(f"jax {jax.__version__}: {len(files)} texts in {args.out}")
    different = []
    for file in files if args.compare else []:
        before, after = (path.read_text().splitlines() for path in (args.compare / file.name, file))
        if before != after:
            different.append(file.name)
            diff = list(difflib.unified_diff(before, after, "before", "after", n=0, lineterm=""))
            print("\n".join([f"{file.name} differs ({len(diff)} lines):", *(line[:160] for line in diff[:12])]))
    if args.compare:
        print(f"{len(files) - len(different)} of {len(files)} texts are the same")
    return min(len(different), 1)


if __name__ == "__main__":
    sys.exit(main())
