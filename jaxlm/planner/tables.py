"""The plan of a run as text: tables and lines of at most 80 columns."""

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

from rich.table import Table

from jaxlm.units import date_text, duration, gb, seconds_text


def tables(report: dict[str, Any], now: datetime) -> Iterator[Table | str]:
    """Tables and lines of at most 80 columns.

    Args:
        report: as `make_plan` returns it.
        now: when the run would start.
    """
    machine = report["machine"]
    data, fsdp = machine["data_devices"], machine["fsdp_devices"]
    several = f"{data * fsdp} x " if data * fsdp > 1 else ""
    yield f"{machine['precision']} on {several}{machine['device']}, jax {machine['jax']}"
    yield _model_table(report["model"])
    yield _memory_table(report["memory"], f"Memory of each (data {data}, fsdp {fsdp})" if several else "Memory")
    yield _advice(report)
    yield from _speed_lines(report)
    yield _disk_table(report["disk"])
    yield from _schedule_lines(report["schedule"], now)


def _model_table(model: dict[str, Any]) -> Table:
    epochs = "data not prepared yet"
    if model["epochs"] is not None:
        epochs = f"{model['epochs']:,.{0 if model['epochs'] >= 100 else 2}f} of {model['data_tokens']:,}"
    rows = [(name, f"{count:,}") for name, count in model["parameters_by_part"].items()]
    rows += [
        ("parameters", f"{model['parameters']:,}"),
        ("FLOPs per token, 6 P + 6 L T D", f"{model['flops_per_token']:,}"),
        ("tokens per step", f"{model['tokens_per_step']:,}"),
        ("tokens in all", f"{model['tokens']:,}"),
        ("tokens per parameter", f"{model['tokens_per_parameter']:.3g}"),
        ("epochs of the training tokens", epochs),
    ]
    return _table("Model", rows)


def _memory_table(memory: dict[str, Any], title: str) -> Table:
    parts = {
        "weights": "weights",
        "moments": "optimizer state",
        "accumulated": "accumulated gradients",
        "gradients": "gradients",
        "temporaries": "activations, temporaries",
        "checkpoint_copy": "copy of a checkpoint, during a save",
    }
    process = "the process, buffers of a save" + ("" if memory["process_is_measured"] else " (at least)")
    rows = [(text, gb(memory[f"{name}_bytes"])) for name, text in parts.items()]
    rows += [
        (process, gb(memory["process_bytes"])),
        ("peak", gb(memory["total_bytes"])),
        ("available", gb(memory["available_bytes"])),
        ("fits", "yes" if memory["fits"] else "NO"),
    ]
    return _table(title, rows)


def _disk_table(disk: dict[str, Any]) -> Table:
    rows = [
        ("tokens", gb(disk["tokens_bytes"]) if disk["tokens_bytes"] else "not prepared yet"),
        ("a checkpoint", gb(disk["checkpoint_bytes"])),
        ("all checkpoints", gb(disk["kept_checkpoints_bytes"])),
        ("final model", gb(disk["final_model_bytes"])),
        ("metrics, samples, TensorBoard, at most", gb(disk["records_bytes"])),
        ("work directory at the end", gb(disk["left_bytes"])),
        ("peak, with a rolling and the next one", gb(disk["most_bytes"])),
        ("free", gb(disk["free_bytes"])),
        ("fits", "yes" if disk["fits"] else "NO"),
    ]
    return _table("Disk", rows)


def _advice(report: dict[str, Any]) -> str:
    setting, fits = report["setting"], report["memory"]["fits"]
    if setting is None:
        return "The current microbatch_chunks and remat are the best choice."
    if not setting["fits"]:
        return "No microbatch_chunks and remat make it fit: choose a smaller model, context or\nbatch_size."
    chunks, remat = setting["microbatch_chunks"], str(setting["remat"]).lower()
    flags = f"--config.microbatch_chunks={chunks} --config.model.remat={remat}"
    return f"{'Faster, and fits' if fits else 'To fit'}: {flags} ({gb(setting['arrays_bytes'])} of arrays)."


def _speed_lines(report: dict[str, Any]) -> Iterator[Table | str]:
    speed = report["speed"]
    if why := report["numerics_check_failure"]:
        yield f"A run would be refused: {why}"
    if not speed:
        why = report["not_measured_because"]
        yield f"Speed: not measured ({why})" if why else "Speed: not measured, because of --no-measure"
        return
    time = {name: seconds_text(seconds) for name, seconds in speed.items() if name.endswith("_seconds")}
    rows = [
        ("tokens per second", f"{speed['tokens_per_second']:,.0f}"),
        ("a step", time["step_seconds"]),
        ("  most steps", f"{time['step_fast_seconds']} to {time['step_slow_seconds']}"),
        ("  tokens measured at a time", f"{speed['measured_tokens_per_step']:,}"),
        ("matmul speed", f"{speed['matmul_flops_per_second'] / 1e9:,.0f} GFLOP/s"),
        ("  of that, in a step", f"{speed['utilisation']:.0%}"),
        ("time to the first step", time["start_seconds"]),
        ("an evaluation", time["evaluation_seconds"]),
        ("samples", time["samples_seconds"]),
        ("a save delays training by", time["save_seconds"]),
        ("  and is complete after", time["saving_seconds"]),
    ]
    yield _table("Speed", rows)


def _schedule_lines(schedule: dict[str, Any], now: datetime) -> Iterator[Table | str]:
    after = schedule.get("first_after_seconds", {})
    rows = [
        (name, f"{step:,}", duration(after[name]) if after else "", f"{schedule['every_steps'][name]:,}")
        for name, step in schedule["first_step_of"].items()
    ]
    yield _table("Schedule", rows, ("first", "step", "after", "then every"))
    lines = [f"Checkpoint {old:,} is deleted when {new:,} is complete." for old, new in schedule["deleted_after_steps"]]
    if seconds := schedule["rolling_after_seconds"]:
        lines += [f"The next save replaces a rolling checkpoint, made {seconds / 60:g} minutes after a save."]
    lines += ["Checkpoints at the end: " + ", ".join(f"{step:,}" for step in schedule["kept_at_the_end_steps"]) + "."]
    yield "\n".join(lines)
    if not after:
        return
    unit = schedule["timeline_unit"]
    total, fast, slow = (schedule[f"total_{which}seconds"] for which in ("", "fast_", "slow_"))
    rows = []
    for row in schedule["timeline"]:
        kept = row["kept_checkpoints_steps"]
        span = f"{kept[0]:,} to {kept[-1]:,}" if kept else "none yet"
        rows += [(f"{row[unit]:,}", f"{row['step']:,}", f"{row['tokens'] / 1e6:,.1f}", span)]
    yield _table("Timeline", rows, (unit, "step", "million tokens", "checkpoints"))
    when = [date_text(now, seconds) for seconds in (total, fast, slow)]
    yield f"{schedule['steps']:,} steps take {duration(total)}: started now, until {when[0]}."
    yield (
        f"With the spread of the measured steps, and {schedule['others_share']:.0%} for heat and other programs:\n"
        f"{duration(fast)} to {duration(slow)}, {when[1]} to {when[2]}."
    )


def _table(title: str, rows: Sequence[Sequence[str]], header: Sequence[str] = ("", "")) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", box=None, show_header=any(header), pad_edge=False
    )
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table
