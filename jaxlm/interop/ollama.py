"""The Modelfile beside a GGUF file, from which `ollama create` makes a model.

Its syntax is that of https://docs.ollama.com/modelfile. Nothing of ollama was run.
"""

import shlex
from pathlib import Path

from jaxlm.config import Config
from jaxlm.errors import RunError, disk_advice
from jaxlm.interop.mark import is_sealed, seal
from jaxlm.storage import atomic

TOKENS = 200  # that a run of ollama writes at most: without a limit, a model that ends no text writes for ever
_SEAL = "# written by jaxlm, which keeps an edited file; sha256 {}"
_MODELFILE = """\
# {command}
FROM ./{name}
TEMPLATE \"\"\"{{{{ .Prompt }}}}\"\"\"
PARAMETER num_ctx {context}
PARAMETER num_predict {tokens}
PARAMETER temperature {sample.temperature}
PARAMETER top_k {sample.top_k}
PARAMETER top_p {sample.top_p}
PARAMETER repeat_penalty 1.0
"""


def modelfile_of(gguf: Path) -> Path:
    """The path of the Modelfile that belongs to a GGUF file."""
    return gguf.with_suffix(".Modelfile")


def write_modelfile(gguf: Path, config: Config, overwrite: bool) -> bool:
    """Writes the Modelfile of a GGUF file, and returns whether it is there as written.

    A file that a person wrote or edited stays, and without `overwrite` any other. Raises RunError if the disk failed.
    """
    file = modelfile_of(gguf)
    command = f"ollama create {shlex.quote(gguf.stem)} -f {shlex.quote(file.name)}"
    sizes = {"context": config.model.context, "tokens": TOKENS, "sample": config.sample}
    data = seal(_MODELFILE.format(command=command, name=gguf.name, **sizes), _SEAL)
    try:
        present = file.read_bytes()
    except FileNotFoundError:
        present = None
    except OSError:  # no file
        return False
    if present is not None and present != data and not (overwrite and is_sealed(present, _SEAL)):
        return False
    try:
        atomic.write_file(file, data)
    except OSError as error:
        raise RunError(f"cannot write {file} ({error}): {disk_advice(error)}, run the same command again") from error
    return True
