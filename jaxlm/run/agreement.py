"""What the processes of a run must do after the same step: stop on a signal, and save by time."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.core.sharding import ROWS
from jaxlm.device import distributed


class Agreement:
    """The signal on which to stop, and whether a save is late, for all processes of a run.

    One process alone agrees with itself at once. Several let their devices compute the larger numbers after each
    micro-batch, and read them with its metrics, so that no host waits in a step.
    """

    def __init__(self, mesh: Mesh | None, signal: Callable[[], int], is_late: Callable[[], bool]):
        self._signal, self._is_late = signal, is_late
        self._agreed = (0, 0) if mesh and jax.process_count() > 1 else None
        if mesh:
            self._rows = NamedSharding(mesh, ROWS)
            self._largest = jax.jit(lambda votes: votes.max(axis=0), out_shardings=NamedSharding(mesh, PartitionSpec()))

    @property
    def signal(self) -> int:
        """The number of the signal on which to stop; 0: none."""
        return self._signal() if self._agreed is None else self._agreed[0]

    @property
    def is_late(self) -> bool:
        return self._is_late() if self._agreed is None else bool(self._agreed[1])

    def vote(self) -> Any:
        """Begins to agree on what holds in each process."""
        if self._agreed is None:
            return None
        mine = np.array([[self._signal(), self._is_late()]], np.int32)
        return self._largest(
            jax.make_array_from_process_local_data(self._rows, mine.repeat(jax.local_device_count(), axis=0))
        )

    def take(self, vote: Any) -> None:
        """Waits for what `vote` has begun, and lets it hold."""
        if vote is not None:
            signal, is_late = jax.device_get(vote).tolist()
            self._agreed = signal, is_late

    def now(self) -> int:
        """Agrees in a pause, where the hosts may wait for each other; returns `signal`."""
        if self._agreed is not None:
            votes = [vote.split() for vote in distributed.exchange("vote", f"{self._signal()} {int(self._is_late())}")]
            self._agreed = max(int(signal) for signal, _ in votes), max(int(is_late) for _, is_late in votes)
        return self.signal
