"""The tables of the study: which recipes it compares, with which seeds.

A recipe is what differs from `configs/m2_60m.py`. Rates are peaks. A batch is in tokens a step, a length in steps or in
tokens. All trials are whole schedules.
"""

from collections.abc import Sequence
from typing import Any

from configs import m2_60m_fast
from experiments.learning.trial import Trial

CONTEXT = 1024
USERS_BATCH = 65_536
N = 1200 * USERS_BATCH  # tokens of the tuned AdamW that the goals name
SEEDS = (0, 1, 2)

Settings = dict[str, Any]


def batch(tokens: int) -> Settings:
    """The settings for so many tokens a step."""
    sequences = tokens // CONTEXT
    micro = min(sequences, 32)
    return {"batch_size": micro, "grad_accum_steps": sequences // micro}


def as_written(steps: int) -> Settings:
    """The user's recipe: AdamW, 3e-4, cosine to a tenth."""
    return {"max_steps": steps}


def adamw(steps: int, rate: float = 2e-3, tokens: int = USERS_BATCH, **changes: Any) -> Settings:
    """AdamW with a linear schedule to zero."""
    settings = {
        "max_steps": steps,
        **batch(tokens),
        "optimizer.learning_rate": rate,
        "optimizer.b2": 0.98,
        "optimizer.lr_schedule": "linear",
        "optimizer.min_lr_ratio": 0.0,
    }
    return settings | _dotted(changes)


def muon(tokens: int, batch_tokens: int = 16_384, scale: float = 1.0, **changes: Any) -> Settings:
    """The recipe of `configs/m2_60m_fast.py` for a length in tokens, with its rates times `scale`."""
    recipe = m2_60m_fast.get_config().optimizer
    settings = {f"optimizer.{name}": value for name, value in recipe.items()} | {
        "max_steps": round(tokens / batch_tokens),
        **batch(batch_tokens),
        "model.qk_norm": True,
        "optimizer.learning_rate": recipe.learning_rate * scale,
        "optimizer.muon_learning_rate": recipe.muon_learning_rate * scale,
        "optimizer.warmup_steps": max(20, round(20 * USERS_BATCH / batch_tokens)),
    }
    return settings | _dotted(changes)


def own(vocab_size: int, **changes: Any) -> Settings:
    """A vocabulary trained on the text, and sizes of the model."""
    return {"data.tokenizer": "own", "model.vocab_size": vocab_size} | _dotted(changes)


def _dotted(changes: Settings) -> Settings:
    return {name.replace("__", "."): value for name, value in changes.items()}


def seeds(name: str, settings: Settings, which: Sequence[int] = SEEDS) -> list[Trial]:
    return [Trial(name, settings, seed) for seed in which]


def one(name: str, settings: Settings) -> list[Trial]:
    return seeds(name, settings, (0,))


def equal_arithmetic(settings: Settings, budget: Settings | None = None) -> Settings:
    """The settings with so many steps that their arithmetic is that of `budget`, or of themselves with GPT-2's
    vocabulary and the preset's sizes."""
    sizes = ("model.vocab_size", "model.layers", "model.width", "model.mlp_width")
    budget = budget or {name: value for name, value in settings.items() if name not in sizes}
    return settings | {"max_steps": round(budget["max_steps"] * flops_per_step(budget) / flops_per_step(settings))}


def flops_per_step(settings: Settings) -> float:
    """6 for each number in a matrix and each token, attention over half the context, and Newton-Schulz."""
    sizes = {"vocab_size": 50_257, "layers": 8, "width": 512, "mlp_width": 2048, "context": CONTEXT}
    V, L, D, F, T = (settings.get(f"model.{name}", size) for name, size in sizes.items())
    tokens = settings.get("batch_size", 32) * settings.get("grad_accum_steps", 2) * T
    per_token = 6 * (V * D + L * (4 * D * D + 3 * D * F)) + 6 * L * T * D
    iteration = L * (4 * 6 * D**3 + 3 * (4 * D * D * F + 2 * D**3))
    return per_token * tokens + (5 * iteration if settings.get("optimizer.name") == "muon" else 0)


def flops(trial: Trial) -> float:
    """The arithmetic of a whole trial."""
    return flops_per_step(trial.settings) * trial.settings["max_steps"]


def _own_at(part: float, vocab_size: int, batch_tokens: int = 16_384, **changes: Any) -> Settings:
    """The recipe with an own vocabulary at 1/part of the arithmetic of AdamW's N tokens."""
    settings = muon(N, batch_tokens) | own(vocab_size, **changes)
    steps = flops_per_step(adamw(1200)) * 1200 / part / flops_per_step(settings)
    return settings | {"max_steps": round(steps)}


SHORT = round(N / 3.5)
HALF = N // 2  # 600 steps of the user's batch
QUARTER = round(N / 4.5)
LENGTHS = {
    "N/3.5": SHORT,
    "N/4.5": QUARTER,
    "N/5.5": round(N / 5.5),
    "N/8": round(N / 8),
    "2N/4.5": round(2 * N / 4.5),
    "2N/6": round(2 * N / 6),
}
FIRST_SEEDS = {"N/3.5": (2,), "N/4.5": SEEDS, "N/5.5": (0, 1), "N/8": (1, 2), "2N/4.5": (1, 2), "2N/6": (0, 2)}
ADAMW_TUNED = {  # each is better alone, at 1,200 steps
    "optimizer__weight_decay": 0.3,
    "optimizer__warmup_steps": 300,
    "optimizer__lr_decay_fraction": 0.4,
}


PLAIN_MUON = {  # without the parts of the recipe
    "optimizer__muon_momentum_warmup": 0,
    "optimizer__muon_b2": 0.0,
    "optimizer__cautious": False,
    "optimizer__muon_weight_decay": 0.1,
    "optimizer__average": 0.0,
}


def _without(changes: Settings, *names: str) -> Settings:
    return {key: value for key, value in changes.items() if key.removeprefix("optimizer__") not in names}


def _first(scale: float = 1.0, batch_tokens: int = 16_384, tokens: int = SHORT, **changes: Any) -> Settings:
    """The recipe with the first rates times `scale`."""
    rates = {"optimizer__learning_rate": 6e-3 * scale, "optimizer__muon_learning_rate": 2.2e-3 * scale}
    return muon(tokens, batch_tokens, **rates | changes)


def _sizes(width: int) -> Settings:
    return {"model__width": width, "model__heads": width // 64, "model__mlp_width": 4 * width}


QUICKSTART = {  # the start of the search for `configs/quickstart.py`
    "data.tokenizer": "own",
    "model.vocab_size": 8192,
    "batch_size": 8,
    "model.context": 256,
    "model.layers": 3,
    "model.width": 96,
    "model.heads": 3,
    "model.mlp_width": 288,
    "optimizer.learning_rate": 1.2e-2,
    "optimizer.muon_learning_rate": 8e-3,
    "optimizer.muon_momentum": 0.9,
    "optimizer.lr_decay_fraction": 0.5,
    "optimizer.average": 0.98,
    "optimizer.muon_weight_decay": 0.0,
    "optimizer.weight_decay": 0.0,
    "optimizer.muon_b2": 0.95,
    "optimizer.b1": 0.85,
    "optimizer.b2": 0.99,
    "model.qk_norm": True,
    "model.tied": False,
    "optimizer.warmup_steps": 10,
    "optimizer.cautious": True,
    "model.output_init": "zero",
    "model.rope_theta": 1e4,
    "max_steps": 891,
    "model.precision": "float32",
}


TABLES: dict[str, list[Trial]] = {
    # the baseline: AdamW tuned at the user's batch, then with the batch tuned too
    "adamw": [
        *seeds("AdamW 2e-3", adamw(1200)),
        *one("as written", as_written(1200)),
        *[t for rate in (1e-3, 1.5e-3, 3e-3) for t in one(f"AdamW {rate:g}", adamw(1200, rate))],
        *one("AdamW 2e-3, b2 0.95", adamw(1200, optimizer__b2=0.95)),
        *one("AdamW 2e-3, b2 0.99", adamw(1200, optimizer__b2=0.99)),
        *one("AdamW 2e-3, decay 0.3", adamw(1200, optimizer__weight_decay=0.3)),
        *one("AdamW 2e-3, decay 0.03", adamw(1200, optimizer__weight_decay=0.03)),
        *one("AdamW 2e-3, warm-up 300", adamw(1200, optimizer__warmup_steps=300)),
        *one(
            "AdamW 2e-3, cosine to a tenth", adamw(1200, optimizer__lr_schedule="cosine", optimizer__min_lr_ratio=0.1)
        ),
        *one("AdamW 2e-3, linear over the last 0.4", adamw(1200, optimizer__lr_decay_fraction=0.4)),
        *one("AdamW 3e-3, warm-up 300", adamw(1200, 3e-3, optimizer__warmup_steps=300)),
        *[t for rate in (1e-3, 1.4e-3, 2e-3) for t in one(f"AdamW 32k {rate:g}", adamw(2400, rate, 32_768))],
        *[t for rate in (7e-4, 1e-3, 1.4e-3) for t in one(f"AdamW 16k {rate:g}", adamw(4800, rate, 16_384))],
        *one("AdamW 131k 3e-3", adamw(600, 3e-3, 131_072)),
        *seeds("AdamW 2e-3, 600 steps", adamw(600), (0, 1)),
        *seeds("AdamW tuned", adamw(1200, **ADAMW_TUNED)),
        *one("AdamW tuned, 3e-3", adamw(1200, 3e-3, **ADAMW_TUNED)),
        *seeds("AdamW tuned, 2,400 steps", adamw(2400, **ADAMW_TUNED)),
        *one("AdamW tuned, 16k 1.4e-3", adamw(4800, 1.4e-3, 16_384, **ADAMW_TUNED)),
        *one("AdamW tuned, 16k 2e-3", adamw(4800, 2e-3, 16_384, **ADAMW_TUNED)),
        *one("AdamW tuned, 16k 3e-3", adamw(4800, 3e-3, 16_384, **ADAMW_TUNED)),
        *one("AdamW tuned, 8k 1.4e-3", adamw(9600, 1.4e-3, 8192, **ADAMW_TUNED)),
        *one("as written, 2,400 steps", as_written(2400)),
    ],
    # what the goals ask: whole schedules of fewer tokens, three seeds
    "goals": [trial for name, tokens in LENGTHS.items() for trial in seeds(f"recipe, {name}", muon(tokens))],
    # each part of the recipe on top of the ones before, at the user's batch and 600 steps
    "parts": [
        *one("AdamW 2e-3 and QK-norm", adamw(600, model__qk_norm=True)),
        *[
            trial
            for name, without in {
                "plain Muon, no QK-norm": PLAIN_MUON | {"model__qk_norm": False},
                "and QK-norm": PLAIN_MUON,
                "and NorMuon": _without(PLAIN_MUON, "muon_b2"),
                "and momentum warm-up": _without(PLAIN_MUON, "muon_b2", "muon_momentum_warmup"),
                "and cautious decay 0.8": {"optimizer__average": 0.0},
                "and the average": {},
            }.items()
            for trial in one(name, muon(HALF, USERS_BATCH, **without))
        ],
        *one("at 32k tokens a step", muon(HALF, 32_768)),
        *seeds("at 16k: the recipe", muon(HALF)),
    ],
    # the recipe with one change
    "around": [
        *seeds("recipe, N/4.5", muon(QUARTER)),
        *[
            trial
            for change, setting in {
                "Muon rate 1.5e-3": {"optimizer__muon_learning_rate": 1.5e-3},
                "Muon rate 3.3e-3": {"optimizer__muon_learning_rate": 3.3e-3},
                "Adam rate 6e-3": {"optimizer__learning_rate": 6e-3},
                "Adam rate 1.8e-2": {"optimizer__learning_rate": 1.8e-2},
                "Adam rate 2.4e-2": {"optimizer__learning_rate": 2.4e-2},
                "without QK-norm": {"model__qk_norm": False},
                "without NorMuon": {"optimizer__muon_b2": 0.0},
                "NorMuon 0.98": {"optimizer__muon_b2": 0.98},
                "without momentum warm-up": {"optimizer__muon_momentum_warmup": 0},
                "momentum warm-up 400": {"optimizer__muon_momentum_warmup": 400},
                "momentum 0.9": {"optimizer__muon_momentum": 0.9},
                "momentum 0.97": {"optimizer__muon_momentum": 0.97},
                "decay not cautious": {"optimizer__cautious": False},
                "decay 0.4": {"optimizer__muon_weight_decay": 0.4},
                "decay 1.6": {"optimizer__muon_weight_decay": 1.6},
                "without average": {"optimizer__average": 0.0},
                "average 0.99": {"optimizer__average": 0.99},
                "rate falls over the last 0.3": {"optimizer__lr_decay_fraction": 0.3},
                "rate falls over the last 0.5": {"optimizer__lr_decay_fraction": 0.5},
                "b2 0.95": {"optimizer__b2": 0.95},
                "b2 0.99": {"optimizer__b2": 0.99},
                "b1 0.8": {"optimizer__b1": 0.8},
                "warm-up 20": {"optimizer__warmup_steps": 20},
                "decay of the embedding 0.1": {"optimizer__weight_decay": 0.1},
                "theta 1e5": {"model__rope_theta": 1e5},
                "untied head": {"model__tied": False},
                "outputs from zero": {"model__output_init": "zero"},
                "Adam rate 1.8e-2, Muon rate 3.3e-3": {
                    "optimizer__learning_rate": 1.8e-2,
                    "optimizer__muon_learning_rate": 3.3e-3,
                },
                **{
                    f"Muon rate {rate}, decay {decay}": {
                        "optimizer__muon_learning_rate": float(rate),
                        "optimizer__muon_weight_decay": decay,
                    }
                    for rate in ("1.5e-3", "3.3e-3")
                    for decay in (0.4, 1.6)
                },
                "b1 0.8, b2 0.99": {"optimizer__b1": 0.8, "optimizer__b2": 0.99},
            }.items()
            for trial in one(change, muon(QUARTER, **setting))
        ],
        *[Trial(f"order: {order}", muon(QUARTER), 0, order=order) for order in ("text", "documents")],
        *[Trial(loss, muon(QUARTER), 0, loss=loss) for loss in ("soft-cap 15", "soft-cap 30", "z-loss 1e-4")],
    ],
    # what led to the rates of the recipe: one change to Adam's rate 6e-3 and Muon's 2.2e-3
    "tune": [
        *[
            trial
            for batch_tokens, lengths in ((32_768, ("N/3.5", "N/4.5", "2N/4.5")), (16_384, LENGTHS))
            for name in lengths
            for trial in seeds(
                f"ours {batch_tokens // 1024}k, {name}",
                _first(1.0, batch_tokens, tokens=LENGTHS[name]),
                SEEDS if batch_tokens == 32_768 else FIRST_SEEDS[name],
            )
        ],
        *[
            trial
            for change, settings in {
                "rates times 1.4": _first(1.4),
                "rates times 0.7": _first(0.7),
                "8k, rates times 0.7": _first(0.7, 8192),
                "8k": _first(1.0, 8192),
                "Adam rate times 2": _first(optimizer__learning_rate=1.2e-2),
                "Adam rate times 0.5": _first(optimizer__learning_rate=3e-3),
                "Muon rate times 1.5": _first(optimizer__muon_learning_rate=3.3e-3),
                "decay over the last 0.6": _first(optimizer__lr_decay_fraction=0.6),
                "decay over the last 0.8": _first(optimizer__lr_decay_fraction=0.8),
                "b2 0.99": _first(optimizer__b2=0.99),
                "decay 0.4": _first(optimizer__muon_weight_decay=0.4),
                "momentum warm-up 400": _first(optimizer__muon_momentum_warmup=400),
            }.items()
            for trial in one(f"ours 16k, N/3.5, {change}", settings)
        ],
    ],
    "batch": [
        *one("4k", muon(SHORT, 4096)),
        *one("8k", muon(SHORT, 8192)),
        *one("8k, rates times 0.7", muon(SHORT, 8192, 0.7)),
        *one("16k", muon(SHORT)),
        *one("32k", muon(SHORT, 32_768)),
        *one("32k, rates times 1.4", muon(SHORT, 32_768, 1.4)),
        *one("64k", muon(SHORT, USERS_BATCH)),
        *one("64k, rates times 2", muon(SHORT, USERS_BATCH, 2.0)),
        *one("131k, rates times 2.8", muon(SHORT, 131_072, 2.8)),
        *[Trial("from 8k to 16k", muon(round(SHORT * 4 / 3)), 0, True)],
        *[Trial("from 16k to 32k", muon(round(SHORT * 4 / 3), 32_768), 0, True)],
    ],
    # at a part of the arithmetic of AdamW's N tokens with GPT-2's vocabulary
    "vocabulary": [
        *one("GPT-2, N/3.5", muon(SHORT)),
        *[t for size in (8, 16) for t in seeds(f"own {size}k, 1/4", _own_at(4, size * 1024))],
        *[t for size in (8, 16) for t in seeds(f"own {size}k, 1/6", _own_at(6, size * 1024))],
        *[
            t
            for name, sizes in {
                "12 layers": {"model__layers": 12},
                "6 layers": {"model__layers": 6},
                "width 384": {"model__width": 384, "model__heads": 6},
                "MLP 1536": {"model__mlp_width": 1536},
            }.items()
            for t in one(f"own 8k, {name}, 1/4", _own_at(4, 8192, **sizes))
        ],
        *one("own 8k, 32k tokens a step, 1/4", _own_at(4, 8192, 32_768)),
        # at the arithmetic of the recipe's N/3.5 tokens with GPT-2's vocabulary
        *seeds("own 8k", equal_arithmetic(muon(SHORT) | own(8192))),
        *[t for size in (4, 16) for t in one(f"own {size}k", equal_arithmetic(muon(SHORT) | own(1024 * size)))],
        *[
            t
            for name, sizes in {
                "width 384": {"model__width": 384, "model__heads": 6},
                "width 640": {"model__width": 640, "model__heads": 10},
            }.items()
            for t in one(f"own 16k, {name}", equal_arithmetic(muon(SHORT) | own(16_384, **sizes)))
        ],
        *one("own 8k, width 640", equal_arithmetic(muon(SHORT) | own(8192, model__width=640, model__heads=10))),
        *one("own 8k, 1/2 of it", equal_arithmetic(muon(round(N / 3.5 / 2)) | own(8192))),
    ],
    "robust": [
        *one("rates times 2", muon(SHORT, scale=2.0)),
        *one("rates times 0.5", muon(SHORT, scale=0.5)),
        *[
            t
            for sequences, scale in ((32, 1.4), (64, 2.0), (128, 2.8))
            for t in one(f"{sequences} sequences, rates times {scale}", muon(SHORT, sequences * CONTEXT, scale))
        ],
        *one("width 256, rates times 1.4", muon(SHORT, scale=1.4, **_sizes(256))),
        *one("width 1024, rates times 0.7", muon(QUARTER, scale=0.7, **_sizes(1024))),
    ],
    # around the quickstart; other sizes with so many steps that a run takes about the same time on a CPU
    "quickstart": [
        *[Trial("base", QUICKSTART, seed, preset="quickstart") for seed in SEEDS],
        *[
            Trial(name, QUICKSTART | _dotted(changes), preset="quickstart")
            for name, changes in {
                "12 sequences": {"batch_size": 12, "max_steps": 626},
                "16 sequences": {"batch_size": 16, "max_steps": 483},
                "context 128, 16 sequences": {"batch_size": 16, "model__context": 128},
                "6 heads": {"model__heads": 6},
                "2 heads": {"model__heads": 2},
                "Muon rate 1e-2": {"optimizer__muon_learning_rate": 1e-2},
                "Muon rate 1.3e-2": {"optimizer__muon_learning_rate": 1.3e-2},
                "Adam rate 9e-3": {"optimizer__learning_rate": 9e-3},
                "Adam rate 1.8e-2": {"optimizer__learning_rate": 1.8e-2},
                "rate falls over the last 0.4": {"optimizer__lr_decay_fraction": 0.4},
                "momentum 0.85": {"optimizer__muon_momentum": 0.85},
                "without average": {"optimizer__average": 0.0},
                "NorMuon 0.98": {"optimizer__muon_b2": 0.98},
                "outputs not from zero": {"model__output_init": "scaled"},
                "b1 0.8": {"optimizer__b1": 0.8},
                "theta 1e3": {"model__rope_theta": 1e3},
                "decay of matrices 0.2": {"optimizer__muon_weight_decay": 0.2},
                "MLP 384": {"model__mlp_width": 384, "max_steps": 867},
                "7,168 tokens": {"model__vocab_size": 7168, "max_steps": 964},
                "10,240 tokens": {"model__vocab_size": 10240, "max_steps": 775},
                "4 layers": {"model__layers": 4, "max_steps": 804},
                "2 layers": {"model__layers": 2, "max_steps": 1001},
                "width 90": {"model__width": 90, "max_steps": 963},
                "width 108": {"model__width": 108, "model__mlp_width": 320, "max_steps": 765},
                "4 layers of width 80": _sizes(80)
                | {"model__layers": 4, "model__heads": 2, "model__mlp_width": 256, "max_steps": 1016},
                "tied head": {"model__tied": True},
                "without QK-norm": {"model__qk_norm": False},
                "480 steps of 12 sequences": {"batch_size": 12, "max_steps": 480},
                "850 steps of 12 sequences": {"batch_size": 12, "max_steps": 850},
                "1,170 steps of 12 sequences": {"batch_size": 12, "max_steps": 1170},
            }.items()
        ],
    ],
}
