"""What each kind of device computes in its own way.

`jaxlm.device.backend` resolves `model.implementation = auto` to a name for the device. The core looks up the record by
this name and asks nothing else about the device.
"""

from jaxlm.core.ops.apple import APPLE
from jaxlm.core.ops.cpu import CPU
from jaxlm.core.ops.cuda import CUDA
from jaxlm.core.ops.hopper import HOPPER
from jaxlm.core.ops.record import Ops
from jaxlm.core.ops.xla import XLA

__all__ = ["IMPLEMENTATIONS", "Ops", "get"]

IMPLEMENTATIONS = {"xla": XLA, "cpu": CPU, "cuda": CUDA, "hopper": HOPPER, "apple": APPLE}


def get(name: str) -> Ops:
    """The operations of an implementation; `auto`, which no device has resolved, gives those that work anywhere."""
    return IMPLEMENTATIONS["xla" if name == "auto" else name]
