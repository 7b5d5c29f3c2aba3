"""The program that tests a plugin of jax: python -m jaxlm.device.probe MODULE

Loads that plugin and no other, and compares a small model on its device with the CPU. The last line that it prints is a
JSON object: `name`, jax's name for the platform, and `failure`, empty if the plugin computes right.
(`jaxlm.device.plugins` runs it, and stops it if it hangs.)
"""

import json
import logging
import os
import sys
from logging.handlers import BufferingHandler

import jax
from jax.extend.backend import backends

from jaxlm.device import numerics, plugins


def _probe(module: str) -> tuple[str, str]:
    """Returns jax's name for the platform of a plugin, and what is wrong with it."""
    plugins.disable(plugin for plugin in plugins.installed() if plugin.module != module)
    log = BufferingHandler(1000)  # jax only logs the exceptions of plugins that do not initialize
    logging.getLogger("jax").addHandler(log)
    try:
        names = [name for name in backends() if name not in ("cpu", "tpu")]  # jax has these without a plugin
        for record in log.buffer:
            if record.exc_info and record.exc_info[1]:
                raise record.exc_info[1]
        if not names:
            return "", "finds no device"
        return names[0], numerics.failure(numerics.check_small_model(jax.devices(names[0])[0]))
    except Exception as error:
        return "", f"raises {type(error).__name__}: {' '.join(str(error).split())[:300]}"


if __name__ == "__main__":
    name, failure = _probe(sys.argv[1])
    print("\n" + json.dumps({"name": name, "failure": failure}), flush=True)
    os._exit(0)  # without running the plugin's clean-up
