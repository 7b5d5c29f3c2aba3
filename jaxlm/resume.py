"""Where a session of training begins: at the newest checkpoint, or anew; and what must agree for that."""

from typing import Any

import jax

from jaxlm.checkpoint import Checkpoints
from jaxlm.config import Config, differences, to_dict
from jaxlm.errors import RequestError
from jaxlm.step import TrainState, init_state
from jaxlm.tokens import TOKENIZER_NAME, TokenFiles


def describe_run(config: Config, tokens: TokenFiles, seconds: float) -> dict[str, Any]:
    """What a checkpoint says of itself: the settings, which tokens the run reads, seconds trained."""
    fingerprint = {
        "tokenizer": TOKENIZER_NAME,
        "train_tokens": len(tokens.train),
        "train_sha256": tokens.meta.train.sha256 if tokens.meta else None,
    }
    return {"config": to_dict(config), "tokens": fingerprint, "seconds": seconds}


def restore_or_init(
    checkpoints: Checkpoints, config: Config, tokens: TokenFiles, device: jax.Device
) -> tuple[TrainState, float]:
    """The state to go on from, on `device`, and the seconds trained before.

    Without a checkpoint, parameters are drawn on the CPU, so that a seed gives one model whatever trains it.

    Raises:
        RequestError: the newest checkpoint does not fit the settings or the tokens, or cannot be read.
    """
    if not checkpoints.steps():
        with jax.default_device(jax.devices("cpu")[0]):
            state = init_state(config)
        return jax.device_put(state, device), 0.0
    step = checkpoints.steps()[-1]
    saved, ours = checkpoints.meta(step), describe_run(config, tokens, 0)
    found = differences(saved["config"], config)
    for name, value in ours["tokens"].items():
        if saved["tokens"].get(name) != value:
            found.append(f"{name} of the data is {value}, there it is {saved['tokens'].get(name)}")
    if found:
        raise RequestError(
            f"{checkpoints.directory / str(step)} belongs to another run: {'; '.join(found)};"
            " put these back or choose another --workdir"
        )
    like = jax.eval_shape(lambda: init_state(config))
    return checkpoints.state(step, like, device), saved["seconds"]
