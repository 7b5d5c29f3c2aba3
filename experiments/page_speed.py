"""The page that writes: its size, its speed in Chromium, and what fewer bits a weight cost.

    pip install -e ".[browser]" && python -m experiments.page_speed [--workdir runs/quickstart]

The models have the sizes of two presets and random weights. "Beside the weights" is the file without the weights in
base64. The page reads 100 tokens, and writes 64 greedy ones after four. With a run, the program also prints the bits
per byte of the whole validation text, with the weights rounded as a page holds them. Chromium and chromedriver are
Debian's packages.
"""

import argparse
import re
import shutil
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from selenium import webdriver

from experiments.cleanup import temporary_folder
from experiments.interop import random_params, restore_on_cpu
from jaxlm.cli import PRESETS, path, read_config
from jaxlm.core.parameters import Parameter, leaves_by_path, tree_of
from jaxlm.core.train_step import make_eval_step
from jaxlm.data.token_files import bits_per_byte, val_batches
from jaxlm.data.tokenizer import load_tokenizer
from jaxlm.interop.html import write_page
from jaxlm.main import open_data

FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking")
DTYPES = ("f16", "q8_0")
SECONDS = """
    const [text, tokens, done] = arguments;
    (async () => {
        await call("write", { text, tokens, temperature: 0, topK: 0 });
        const started = performance.now();
        while (!(await call("more")).done);
        done((performance.now() - started) / 1000);
    })();
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=path)
    args = parser.parse_args()
    print("| sizes of | weights | file, MB | beside the weights, MB | loads, s | reads, tokens/s | writes, tokens/s |")
    print("|---|---|---|---|---|---|---|")
    for preset in ("quickstart", "m2_60m"):
        for dtype in DTYPES:
            print(f"| {preset} | {dtype} | {' | '.join(measure(preset, dtype))} |", flush=True)
    if args.workdir:
        print_bits(args.workdir)


def measure(preset: str, dtype: str) -> list[str]:
    """The cells of a row of the table."""
    config, _ = read_config(["--config", str(PRESETS / f"{preset}.py")])
    params = random_params(config.model)
    with temporary_folder("page-speed") as folder:
        file = folder / "page.html"
        write_page(file, config, 0, {}, params, load_tokenizer(config.model.vocab_size), dtype)
        page = file.read_bytes()
        beside = len(page) - sum(map(len, re.findall(rb'data-dtype="\w+">([^<]*)<', page)))
        return [f"{len(page) / 1e6:.2f}", f"{beside / 1e6:.2f}", *time_page(file)]


def time_page(file: Path) -> list[str]:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in FLAGS:
        options.add_argument(flag)
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        driver.set_script_timeout(600)
        started = time.monotonic()
        driver.get(file.as_uri())
        while not driver.find_element("id", "write").is_enabled():
            time.sleep(0.05)
        loading = time.monotonic() - started
        driver.execute_async_script(SECONDS, "Once upon a time", 8)  # the compiler sees every loop
        reading = driver.execute_async_script(SECONDS, " a" * 100, 1)
        writing = driver.execute_async_script(SECONDS, "Once upon a time", 64)
    finally:
        driver.quit()
    return [f"{loading:.1f}", f"{100 / reading:.0f}", f"{64 / writing:.0f}"]


def print_bits(workdir: Path) -> None:
    checkpoint = restore_on_cpu(workdir, "float32")
    config, leaves = checkpoint.config, leaves_by_path(checkpoint.params)
    tokens, eval_step = open_data(config), make_eval_step(config)
    print("\n| weights | bits per byte |\n|---|---|")
    for dtype in ("f32", *DTYPES):
        params = tree_of(config.model, lambda parameter, dtype=dtype: rounded(parameter, leaves[parameter.path], dtype))
        loss_sum, count = 0.0, 0
        for inputs, targets in val_batches(tokens.val, config.model.context, 16):
            loss_sum += float(eval_step(params, inputs, targets))
            count += int((targets >= 0).sum())
        print(f"| {dtype} | {bits_per_byte(loss_sum / count, count, tokens.text_bytes(tokens.val[1:])):.5f} |")


def rounded(parameter: Parameter, leaf: Any, dtype: str) -> np.ndarray:
    """The numbers of a parameter as a page holds them."""
    kind = gguf.GGMLQuantizationType["F32" if parameter.kind == "norm_scale" else dtype.upper()]
    rows = np.asarray(leaf).swapaxes(-1, -2) if parameter.hf_transposed else np.asarray(leaf)
    values = gguf.dequantize(gguf.quantize(np.ascontiguousarray(rows), kind), kind)
    return values.swapaxes(-1, -2) if parameter.hf_transposed else values


if __name__ == "__main__":
    main()
