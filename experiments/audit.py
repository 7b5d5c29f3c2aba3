"""Checks that the two JAX plugins for Apple GPUs can run every operation of the programs. Runs anywhere.

    python -m experiments.audit [--config m2_60m]

The programs of a preset (a training step, an evaluation step, prefill, a decode step, the checksums of a
checkpoint) are lowered for each platform, and every operation is checked. Nothing is compiled or computed.
`apple_operations.json` lists the operations that each plugin converts. jaxlib's own pass first decomposes CHLO into
StableHLO, as XLA does before it gives a program to a plugin (SerializeUsingVersionedStablehlo in its
pjrt/mlir_to_hlo.cc), except the operations that XLA passes on whole, `WHOLE`: the plugin must list those. So
chlo.square, the only CHLO here (under jax 0.10.2; there is none under 0.4.34), is a multiplication when it reaches
METAL, whose list lacks it. A violation names the line of jaxlm that it comes from. The program ends with 1 if there is
one.

jax-mps registers lowerings of its own in Python, which run on Linux too:

    pip install --no-deps --only-binary=:all: --platform macosx_14_0_arm64 --target mps jax-mps==0.10.11
    PYTHONPATH=mps python -m experiments.audit --lowerings-of-jax-mps
"""

import argparse
import functools
import json
import math
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
from jaxlib.mlir import passmanager
from jaxlib.mlir.dialects import stablehlo

import jaxlm
from experiments import lowered
from jaxlm.config import Config, from_config_dict
from jaxlm.core.average import add_average
from jaxlm.core.checksum import checksums
from jaxlm.core.sampling import sequence_keys
from jaxlm.device import backend
from jaxlm.device.backend import CONTRACTION_LIMIT

CONVERTED = json.loads(Path(__file__).with_name("apple_operations.json").read_text())
# by XLA's ChloPreserveHighLevelOpsPass, and ChloLegalizeToHighLevelMhloPass in jaxlib 0.4.34
WHOLE = {"acos", "acosh", "asin", "asinh", "atanh", "cosh", "erf", "ragged_dot", "scan", "sinh", "tan", "top_k"}
NUMBERS = {"METAL": {"f32", "i32", "ui32", "i1"}, "mps": {"f32", "f16", "bf16", "i32", "ui32", "i1"}}
CONDITIONAL = "a conditional: those that hand operands through are not converted (jax-ml/jax#21601)"
AVOIDED = {
    "METAL": {"case": CONDITIONAL, "if": CONDITIONAL, "while": "a loop: scan crashes (jax-ml/jax#20750)"},
    "mps": {"case": CONDITIONAL, "if": CONDITIONAL},
}
for names in AVOIDED.values():
    names |= {"reduce_window": "a window, as cumsum makes", "reduce_precision": "no converter on METAL"}


@dataclass(frozen=True)
class Violation:
    """An operation that the platform would refuse, or compute wrong."""

    operation: str
    reason: str
    line: str  # of our source

    def __str__(self) -> str:
        return f"{self.line}: {self.operation}: {self.reason}"


def preset(platform: str, name: str = "m2_60m") -> Config:
    """The preset `configs/NAME.py` as it runs on a platform, by jax's name; on METAL without an average of weights."""
    device: Any = SimpleNamespace(platform=platform)
    settings = import_module(f"configs.{name}").get_config()
    if platform == "METAL":
        settings.optimizer.average = 0.0
    return backend.resolve_run(from_config_dict(settings), device)


@functools.cache  # both platforms share what is traced
def programs(config: Config) -> dict[str, list[tuple[Any, tuple[Any, ...]]]]:
    """The jitted functions that training, evaluation, sampling and saving call, and the shapes of their arguments."""
    parts = {name: (function, arguments) for name, function, arguments in lowered.programs(config)}
    state = parts["train_update"][1][0]
    sampling = [parts[name] for name in ("decode_params", "prefill", "decode_step")]
    key, indices = jax.ShapeDtypeStruct((2,), np.uint32), jax.ShapeDtypeStruct((config.sample.texts,), np.int32)
    averaging = [(add_average, (state.params, state.average))] if state.average else []
    return {
        "training step": [parts[name] for name in ("train_start", "train_chunk", "train_update")],
        "evaluation step": [parts["evaluation"], *averaging],
        "sampling": [(sequence_keys, (key, indices)), *sampling],
        "saving": [(checksums, ((state.params, state.opt_state.inner_opt_state, state.average),))],
    }


def inspect(function: Any, arguments: tuple[Any, ...], platform: str) -> tuple[Counter[str], list[Violation]]:
    """The count of each StableHLO operation in a jitted function, lowered for a platform that need not be present, and
    the violations."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")
        module = function.trace(*arguments).lower(lowering_platforms=(platform,)).compiler_ir()
    whole = WHOLE - set(CONVERTED[platform]["chlo"])
    wrong = [
        Violation(op.name, "no converter", line_of(op))
        for op in operations(module.operation)
        if op.name in {f"chlo.{name}" for name in whole}
    ]
    stablehlo.register_stablehlo_passes()
    with module.context:
        passes = "builtin.module(func.func(chlo-legalize-to-stablehlo))"
        passmanager.PassManager.parse(passes).run(module.operation)
    found = [op for op in operations(module.operation) if not op.name.startswith("func.")]
    wrong += [violation for op in found for violation in violations(op, platform)]
    return Counter(op.name.split(".")[1] for op in found), wrong


def operations(operation: Any) -> Iterator[Any]:
    """All operations nested inside one."""
    for region in operation.regions:
        for block in region.blocks:
            for inner in block.operations:
                yield inner.operation
                yield from operations(inner.operation)


def violations(operation: Any, platform: str) -> Iterator[Violation]:
    """The violations of one operation on a platform."""
    dialect, name = operation.name.split(".")
    reasons = []
    if dialect != "stablehlo" or name not in CONVERTED[platform]["stablehlo"]:
        reasons.append("no converter")
    elif name in AVOIDED[platform]:
        reasons.append(AVOIDED[platform][name])
    kinds = {str(value.type.element_type) for value in (*operation.operands, *operation.results)}
    reasons += [f"{kind}, which it does not compute with" for kind in sorted(kinds - NUMBERS[platform])]
    if name == "custom_call":
        target = operation.attributes["call_target_name"].value
        if target not in CONVERTED[platform]["custom_calls"]:
            reasons.append(f"calls {target}, which is not there")
    elif name == "gather":
        gather = stablehlo.GatherDimensionNumbers(operation.attributes["dimension_numbers"])
        reasons += ["batched, which jax-metal's StableHLO does not know"] * bool(gather.operand_batching_dims)
    elif name == "scatter":
        scatter = stablehlo.ScatterDimensionNumbers(operation.attributes["scatter_dimension_numbers"])
        reasons += ["batched, which jax-metal's StableHLO does not know"] * bool(scatter.input_batching_dims)
    elif name == "dot_general":
        dot = stablehlo.DotDimensionNumbers(operation.attributes["dot_dimension_numbers"])
        sizes = [operation.operands[0].type.shape[axis] for axis in dot.lhs_contracting_dimensions]
        if math.prod(sizes) >= CONTRACTION_LIMIT:
            reasons.append(
                f"contracts {math.prod(sizes):,} numbers, {CONTRACTION_LIMIT:,} or more (pytorch/pytorch#195163)"
            )
        if len(sizes) > 1 and dot.lhs_batching_dimensions:
            reasons.append("a batched matmul with two contracted axes (jax-ml/jax#20114)")
    for reason in reasons:
        yield Violation(name, reason, line_of(operation))


def line_of(operation: Any) -> str:
    """The innermost line of jaxlm that an operation comes from.

    Functions that are lowered once and called often have no lines: then it is the line of a call.
    """
    package = Path(jaxlm.__file__).parent
    frames = re.findall(r'"([^"]+\.py)":(\d+)', str(operation.location))
    for file, line in frames:
        if Path(file).is_relative_to(package):
            return f"jaxlm/{Path(file).relative_to(package)}:{line}"
    function, module = operation, operation
    while module.parent:
        function, module = module, module.parent
    name = function.attributes["sym_name"].value
    for call in operations(module):
        if call.name == "func.call" and call.attributes["callee"].value == name:
            return line_of(call)
    return f"no line of jaxlm ({operation.location})"


def audit(config: Config, platform: str) -> Iterator[tuple[str, Counter[str], list[Violation]]]:
    """For each program its name, the count of each operation, and the violations."""
    for name, parts in programs(config).items():
        counts: Counter[str] = Counter()
        found: list[Violation] = []
        for part in parts:
            more, wrong = inspect(*part, platform)
            counts += more
            found += wrong
        yield name, counts, found


def use_lowerings_of_jax_mps() -> None:
    """Registers what jax-mps registers on a Mac, except the library that computes."""
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
    parser.add_argument("--config", default="m2_60m", help="the name of a preset")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_traceback_in_locations_limit", 100)
    if args.lowerings_of_jax_mps:
        use_lowerings_of_jax_mps()
    print(f"jax {jax.__version__}\n\n| program | platform | operations | kinds | violations |\n|---|---|---|---|---|")
    wrong: list[Violation] = []
    for platform in backend.APPLE:
        for name, counts, found in audit(preset(platform, args.config), platform):
            print(f"| {name} | {platform} | {counts.total():,} | {len(counts)} | {len(found)} |")
            wrong += found
    print("\n".join(["", *dict.fromkeys(map(str, wrong))]))
    return min(len(wrong), 1)


if __name__ == "__main__":
    sys.exit(main())
