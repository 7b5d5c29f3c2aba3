"""What an Apple GPU would be given to run, held against what its two JAX plugins can do. Runs anywhere.

    python -m experiments.audit

The real programs of the 60M preset (a training step, an evaluation step, the token
that is sampled next, the checksums of a checkpoint) are lowered for each platform
and every operation is looked at; nothing is compiled or computed. `apple_operations.json` lists what each plugin
converts. CHLO is first taken apart into StableHLO, by jaxlib's own pass. A violation names the line of jaxlm that it
comes from; the program ends with 1 if there is one.

jax-mps registers lowerings of its own in Python, which run on Linux too:

    pip install --no-deps --only-binary=:all: --platform macosx_14_0_arm64 --target mps jax-mps==0.10.11
    PYTHONPATH=mps python -m experiments.audit --lowerings-of-jax-mps
"""

import argparse
import json
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
from jaxlib.mlir import passmanager
from jaxlib.mlir.dialects import stablehlo

import jaxlm
from configs import m2_60m
from jaxlm import backend
from jaxlm.checksum import checksums
from jaxlm.config import Config, from_config_dict
from jaxlm.generate import PROMPT_BUCKET
from jaxlm.model import unstack
from jaxlm.sampling import Choice, read, write_one
from jaxlm.step import init_state, make_eval_step, make_train_step

CONVERTED = json.loads(Path(__file__).with_name("apple_operations.json").read_text())
WIDEST = 32_767  # from so many contracted numbers on, MPSGraph's products on M1 and M2 read past their operands
REASONS = {
    "case": "a conditional (those that hand operands through are not converted, jax-ml/jax#21601)",
    "if": "a conditional (those that hand operands through are not converted, jax-ml/jax#21601)",
    "reduce_precision": "has no converter on METAL",
    "reduce_window": "a window, as cumsum makes: not to be relied on",
}
LOOPS = "a loop (scan crashes, jax-ml/jax#20750)"
WRONG_TYPES = {"METAL": r"f64|complex|bf16", "mps": r"f64|complex<f64>"}


@dataclass(frozen=True)
class Violation:
    """An operation that the platform would refuse, or compute wrong."""

    operation: str
    reason: str
    line: str  # of our source

    def __str__(self) -> str:
        return f"{self.line}: {self.operation}: {self.reason}"


def preset(platform: str) -> Config:
    """The 60M preset as it runs on a platform, by jax's name."""
    device: Any = SimpleNamespace(platform=platform)
    return backend.resolve_run(from_config_dict(m2_60m.get_config()), device)


def programs(config: Config) -> dict[str, list[tuple[Any, tuple[Any, ...]]]]:
    """What training, evaluating and writing call: the jitted functions and the shapes that they are given."""
    ids = jax.ShapeDtypeStruct((config.batch_size, config.model.context + 1), np.int32)
    some = jax.ShapeDtypeStruct((config.slice_size, config.model.context), np.int32)
    state = jax.eval_shape(lambda: init_state(config))
    step: Any = make_train_step(config)
    total = jax.eval_shape(step.start, state.params)
    model, B, new = config.model, config.sample.texts, config.sample.tokens
    weights = jax.eval_shape(lambda params: unstack(model, params), state.params)
    prompts = [
        jax.ShapeDtypeStruct(shape, kind)
        for shape, kind in (((B, PROMPT_BUCKET), np.int32), ((B,), np.int32), ((B, 2), np.uint32))
    ]
    texts = jax.eval_shape(lambda *a: read(model, *a, new), weights, *prompts)
    choice = Choice(
        np.float32(config.sample.temperature), np.int32(config.sample.top_k), np.float32(config.sample.top_p)
    )
    return {
        "training step": [
            (step.start, (state.params,)),
            (step.add_slice, (state.params, total, ids)),
            (step.update, (state, total)),
        ],
        "evaluation step": [(make_eval_step(config), (state.params, some, some))],
        "sampling": [
            (unstack, (model, state.params)),
            (read, (model, weights, *prompts, new)),
            (write_one, (model, weights, texts, choice, np.int32(0))),
        ],
        "saving": [(checksums, ((state.params, state.opt_state.inner_opt_state),))],
    }


def lowered(function: Any, arguments: tuple[Any, ...], platform: str) -> Any:
    """The StableHLO module of a jitted function for a platform that need not be here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")
        module = function.trace(*arguments).lower(lowering_platforms=(platform,)).compiler_ir()
    stablehlo.register_stablehlo_passes()
    with module.context:
        passes = "builtin.module(func.func(chlo-legalize-to-stablehlo))"
        passmanager.PassManager.parse(passes).run(module.operation)
    return module


def operations(operation: Any) -> Iterator[Any]:
    """All operations inside one, however deep."""
    for region in operation.regions:
        for block in region.blocks:
            for inner in block.operations:
                yield inner.operation
                yield from operations(inner.operation)


def violations(operation: Any, platform: str) -> Iterator[Violation]:
    """What is wrong with an operation on a platform."""
    dialect, name = operation.name.split(".")
    if dialect == "func":
        return
    reasons = []
    if dialect != "stablehlo" or name not in CONVERTED[platform]["stablehlo"]:
        reasons.append("no converter")
    if name in REASONS:
        reasons.append(REASONS[name])
    if name == "while" and platform == "METAL":
        reasons.append(LOOPS)
    if name == "custom_call":
        target = operation.attributes["call_target_name"].value
        if target not in CONVERTED[platform]["custom_calls"]:
            reasons.append(f"calls {target}, which is not there")
    numbers = {"gather": "dimension_numbers", "scatter": "scatter_dimension_numbers"}.get(name)
    if numbers and "batching_dims" in str(operation.attributes[numbers]):
        reasons.append("batched, which StableHLO did not know when jax-metal was made")
    if name == "dot_general":
        reasons += _product(operation)
    types = {str(value.type) for value in (*operation.operands, *operation.results)}
    if wrong := [
        kind for kind in types if re.search(rf"\b(?:{WRONG_TYPES[platform]})\b|x(?:{WRONG_TYPES[platform]})>", kind)
    ]:
        reasons.append(f"numbers that it cannot compute with, {', '.join(wrong)}")
    for reason in reasons:
        yield Violation(name, reason, line_of(operation))


def _product(operation: Any) -> list[str]:
    numbers = str(operation.attributes["dot_dimension_numbers"])
    batch, contracted = (
        [
            int(axis)
            for axis in re.findall(r"\d+", (re.findall(rf"lhs_{kind}_dimensions = \[(.*?)\]", numbers) or [""])[0])
        ]
        for kind in ("batching", "contracting")
    )
    shape = operation.operands[0].type.shape
    reasons = []
    if (size := int(np.prod([shape[axis] for axis in contracted]))) >= WIDEST:
        reasons.append(f"contracts {size:,} numbers, and {WIDEST:,} or more come out wrong (pytorch/pytorch#195163)")
    if batch and len(contracted) > 1:
        reasons.append("a batched product with two contracted axes (jax-ml/jax#20114)")
    return reasons


def line_of(operation: Any) -> str:
    """The innermost line of jaxlm that an operation comes from.

    Functions that are lowered once and called often have no lines: then it is the line of a call.
    """
    package = Path(jaxlm.__file__).parent
    frames = re.findall(r'"([^"]+\.py)":(\d+)', str(operation.location))
    for file, line in frames:
        if Path(file).parent == package:
            return f"jaxlm/{Path(file).name}:{line}"
    function, module = operation, operation
    while module.parent:
        function, module = module, module.parent
    name = function.attributes["sym_name"].value
    for call in operations(module):
        if call.name == "func.call" and call.attributes["callee"].value == name:
            return line_of(call)
    return f"no line of jaxlm ({operation.location})"


def audit(config: Config, platform: str) -> Iterator[tuple[str, Counter[str], list[Violation]]]:
    """Of each program its name, how many there are of each operation, and the violations."""
    for name, parts in programs(config).items():
        found = [op for part in parts for op in operations(lowered(*part, platform).operation)]
        counts = Counter(op.name.split(".")[1] for op in found if not op.name.startswith("func."))
        yield name, counts, [violation for op in found for violation in violations(op, platform)]


def use_lowerings_of_jax_mps() -> None:
    """Registers what jax-mps registers on a Mac, but for the library that computes."""
    from jax.extend.backend import register_backend_factory

    def not_here() -> Any:
        raise RuntimeError("mps computes on a Mac only")

    register_backend_factory("mps", not_here, priority=-1000)
    from jax_plugins.mps import ops

    ops.register_fused_ops()
    ops.patch_jax_functions()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--lowerings-of-jax-mps", action="store_true", help="as on a Mac; jax_plugins.mps must be there"
    )
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_traceback_in_locations_limit", 100)
    if args.lowerings_of_jax_mps:
        use_lowerings_of_jax_mps()
    print(f"jax {jax.__version__}\n\n| program | platform | operations | kinds | violations |\n|---|---|---|---|---|")
    wrong: list[Violation] = []
    for platform in backend.APPLE:
        for name, counts, found in audit(preset(platform), platform):
            print(f"| {name} | {platform} | {counts.total():,} | {len(counts)} | {len(found)} |")
            wrong += found
    print("\n".join(["", *dict.fromkeys(map(str, wrong))]))
    return min(len(wrong), 1)


if __name__ == "__main__":
    sys.exit(main())
