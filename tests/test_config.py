"""Settings: which values are refused and how, conversions, and the page made from them."""

import dataclasses
import json
import math
import re
import runpy
from pathlib import Path

import pytest

from experiments import document_config
from jaxlm import config as config_module
from jaxlm.config import OLD_NAMES, Config, check_name, default_config, differences, from_config_dict, to_dict
from jaxlm.errors import UsageError

REPOSITORY = Path(__file__).parent.parent
CONFIGS = sorted(REPOSITORY.glob("configs/*.py"))
FIXED = {
    "batch_size",
    "grad_accum_steps",
    "hours",
    "seed",
    "init_from",
    "data.val_fraction",
    "data.tokenizer",
    "model.output_init",
    "model.vocab_size",
    "model.context",
    "model.layers",
    "model.heads",
    "model.width",
    "model.mlp_width",
    "model.rope_theta",
    "model.norm_eps",
    "model.qk_norm",
    "model.kv_heads",
    "model.tied",
    "optimizer.name",
    "optimizer.muon_b2",
    "optimizer.average",
}
INTERVALS = ("eval_interval", "save_interval", "generation_interval")


def settings(name, value):
    group, _, name = name.rpartition(".")
    return {group: {name: value}} if group else {name: value}


def all_settings():
    for name, value in to_dict(Config()).items():
        if isinstance(value, dict):
            yield from ((f"{name}.{inner}", inner_value) for inner, inner_value in value.items())
        else:
            yield name, value


def of_type(kind):
    return [name for name, value in all_settings() if type(value) is kind]


def assert_refused(wrong, *named):
    with pytest.raises(UsageError) as caught:
        from_config_dict(wrong)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert len(message) < 250
    for name in named:
        assert name in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, 0) for name in (*INTERVALS, "batch_size", "grad_accum_steps", "max_steps")),
        ("microbatch_chunks", -1),
        *((name, -1) for name in (*INTERVALS, "max_checkpoints", "max_nonfinite_microbatches", "seed")),
        ("max_checkpoints", 0),
        ("max_nonfinite_microbatches", 0),
        ("seed", 2**31),
        ("platform", "cdua"),
        ("model.vocab_size", 256),
        ("model.vocab_size", 50_258),
        ("model.context", 0),
        ("model.layers", 0),
        ("model.heads", 0),
        ("model.kv_heads", -1),
        ("model.kv_heads", 3),
        ("model.kv_heads", 16),
        ("model.width", 0),
        ("model.mlp_width", 0),
        ("model.rope_theta", 0.0),
        ("model.norm_eps", 0.0),
        ("model.output_init", "zeros"),
        ("model.precision", "float16"),
        ("optimizer.name", "adam"),
        ("optimizer.lr_schedule", "cosin"),
        ("optimizer.learning_rate", 0.0),
        ("optimizer.learning_rate", -1e-3),
        ("optimizer.muon_learning_rate", 0.0),
        ("optimizer.muon_momentum", 1.0),
        ("optimizer.muon_momentum_warmup", -1),
        ("optimizer.muon_b2", 1.0),
        ("optimizer.muon_weight_decay", -0.1),
        ("optimizer.average", 0.9995),
        ("optimizer.clip_norm", 0.0),
        ("optimizer.warmup_steps", -1),
        ("optimizer.weight_decay", -0.1),
        ("optimizer.lr_decay_fraction", 1.01),
        ("optimizer.min_lr_ratio", -0.01),
        ("optimizer.b1", 1.0),
        ("optimizer.b2", -0.1),
        ("data.val_fraction", 0.0),
        ("data.val_fraction", 1.0),
        ("data.eval_sequences", -1),
        ("sample.texts", 0),
        ("sample.tokens", 0),
        ("sample.temperature", -0.1),
        ("sample.temperature", 1e7),
        ("sample.top_k", -1),
        ("sample.top_p", 0.0),
        ("sample.top_p", 1.1),
    ],
)
def test_value_out_of_bounds_is_refused_by_name(name, value):
    assert_refused(settings(name, value), name)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", 2**31 - 1),
        ("model.vocab_size", 257),
        ("model.kv_heads", 8),
        ("optimizer.warmup_steps", 0),
        ("optimizer.min_lr_ratio", 0.0),
        ("data.eval_sequences", 0),
        ("sample.temperature", 0.0),
        ("sample.temperature", 1e6),
        ("optimizer.clip_norm", 3.4e38),
        ("sample.top_k", 0),
        ("max_nonfinite_microbatches", 1),
    ],
)
def test_value_on_the_bound_is_taken(name, value):
    assert dict(all_settings())[name] != value
    assert settings(name, value).items() <= _only(to_dict(from_config_dict(settings(name, value))), name).items()


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("batch_size", 0, "at least 1"),
        ("model.norm_eps", 0.0, "above 0"),
        ("optimizer.min_lr_ratio", 2.0, "at least 0 and at most 1"),
        ("optimizer.b1", 1.0, "at least 0 and below 1"),
        ("sample.top_p", 0.0, "above 0 and at most 1"),
        ("optimizer.lr_schedule", "cosin", "did you mean cosine? it is one of cosine, linear"),
    ],
)
def test_message_says_what_is_allowed(name, value, allowed):
    assert_refused(settings(name, value), f"{name} is {value!r}: ", allowed)


def _only(whole, name):
    group, _, name = name.rpartition(".")
    return {group: {name: whole[group][name]}} if group else {name: whole[name]}


@pytest.mark.parametrize(("width", "heads"), [(512, 7), (24, 8), (8, 8), (30, 4)])
def test_width_must_divide_into_heads_of_even_size(width, heads):
    assert_refused({"model": {"width": width, "heads": heads}}, "model.width", str(width), str(heads))


def test_chunks_must_divide_the_batch():
    assert_refused({"batch_size": 32, "microbatch_chunks": 5}, "batch_size", "microbatch_chunks")


@pytest.mark.parametrize("max_steps", [100, 99])
def test_warm_up_must_leave_steps(max_steps):
    assert_refused({"max_steps": max_steps, "optimizer": {"warmup_steps": 100}}, "warmup_steps", "max_steps")


def test_a_second_schedule_must_have_its_steps_and_rise_above_the_least_rate():
    for restart in (100, 900, 1000):
        optimizer = {"warmup_steps": 100, "lr_restart_step": restart}
        assert_refused({"max_steps": 1000, "optimizer": optimizer}, "lr_restart_step", str(restart), "from 101 to 899")
    from_config_dict({"max_steps": 1000, "optimizer": {"warmup_steps": 100, "lr_restart_step": 899}})
    assert_refused(
        {"optimizer": {"lr_restart_step": 200, "lr_restart_ratio": 0.05}}, "lr_restart_ratio", "min_lr_ratio"
    )


def test_the_best_step_is_that_of_whole_evaluations():
    assert_refused({"keep_best": True}, "keep_best", "data.eval_sequences to 0")
    assert from_config_dict({"keep_best": True, "data": {"eval_sequences": 0}}).keep_best


def test_a_corpus_or_a_directory_is_required():
    assert_refused({"data": {"corpus": "", "dir": ""}}, "data.corpus", "data.dir")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3.5e38, -3.5e38])
@pytest.mark.parametrize("name", of_type(float))
def test_numbers_that_float32_does_not_hold_are_refused(name, value):
    assert_refused(settings(name, value), name)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in of_type(int) for value in (True, 8.0, "8", None)),
        *((name, value) for name in of_type(float) for value in (True, "0.5", None)),
        *((name, value) for name in of_type(str) for value in (1, None, True)),
        *((name, value) for name in of_type(bool) for value in (1, "True", None)),
        *(("sample.prompts", value) for value in ("Once", (1,), None)),
        *((group, value) for group in ("model", "optimizer", "data", "sample") for value in (1, "adamw", None)),
    ],
)
def test_value_of_another_type_is_refused_by_name(name, value):
    assert_refused(settings(name, value), name)


def test_an_integer_is_a_valid_float():
    learning_rate = from_config_dict({"optimizer": {"learning_rate": 1}}).optimizer.learning_rate
    assert (type(learning_rate), learning_rate) == (float, 1.0)


@pytest.mark.parametrize(
    "value", [2**31, -(2**31), 10**400, 1 << 20_000], ids=["31 bits", "below", "no float", "not to print"]
)
@pytest.mark.parametrize("name", [*of_type(int), *of_type(float)])
def test_integers_of_more_than_31_bits_are_refused(name, value):
    assert_refused(settings(name, value), name)


@pytest.mark.parametrize("name", ["platform", "model.precision", "model.width", "sample.prompts"])
def test_messages_shorten_long_values(name):
    assert_refused(settings(name, "x" * 10_000), name)


def test_a_huge_number_among_the_prompts_is_refused():
    assert_refused({"sample": {"prompts": ["Once", 1 << 20_000]}}, "sample.prompts")


@pytest.mark.parametrize(
    ("name", "unknown", "nearest"),
    [
        ("btch_size", "btch_size", "batch_size"),
        ("modle", "modle", "model"),
        ("model.contxt", "model.contxt", "context"),
        ("optimizer.lerning_rate", "optimizer.lerning_rate", "learning_rate"),
        ("data.corpsu", "data.corpsu", "corpus"),
        ("sample.temprature", "sample.temprature", "temperature"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(name, unknown, nearest):
    assert_refused(settings(name, 1), unknown, f"did you mean {nearest}?")
    with pytest.raises(UsageError, match=f"{unknown}.*did you mean {nearest}"):
        check_name(name)


def test_a_name_unlike_any_other_is_refused_without_a_guess():
    assert_refused({"xyzzy": 1}, "xyzzy")
    with pytest.raises(UsageError) as caught:
        from_config_dict({"xyzzy": 1})
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize("name", [name for name, _ in all_settings()])
def test_only_names_of_settings_are_accepted(name):
    check_name(name)
    with pytest.raises(UsageError, match="unknown setting"):
        check_name(f"{name}x")


def test_a_config_dict_holds_the_defaults():
    assert from_config_dict(default_config()) == Config() == from_config_dict({})


def test_changes_of_a_config_dict_reach_the_config():
    changed = default_config()
    changed.batch_size = 8
    changed.model.update(vocab_size=300, precision="bf16")
    changed.sample.prompts = ("One",)
    config = from_config_dict(changed)
    assert (config.batch_size, config.model.vocab_size, config.model.precision) == (8, 300, "bf16")
    assert config.sample.prompts == ("One",)
    assert config.optimizer == Config().optimizer


def test_settings_survive_json():
    config = from_config_dict({"seed": 7, "model": {"remat": False}, "sample": {"prompts": ("é → 日", "b")}})
    assert from_config_dict(json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize("name", [name for name, _ in all_settings()])
def test_a_difference_says_whether_the_setting_is_fixed(name):
    saved = json.loads(json.dumps(to_dict(Config())))
    group, _, last = name.rpartition(".")
    (saved[group] if group else saved)[last] = "something else"
    (found,) = differences(saved, Config())
    assert (found.name, found.saved, found.fixed) == (name, "something else", name in FIXED)


def test_difference_has_both_values():
    assert differences(to_dict(Config(seed=3)), Config(seed=4)) == [("seed", 4, 3, True)]


def test_settings_read_from_json_do_not_differ():
    assert differences(json.loads(json.dumps(to_dict(Config()))), Config()) == []


@pytest.mark.parametrize("name", ["init_from", "data.corpus", "data.dir"])
def test_paths_differ_only_if_they_lead_elsewhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("link").symlink_to("folder")
    config = from_config_dict(settings(name, "folder"))
    for same in ("folder", "folder/", "./folder", "link", f"{tmp_path}/folder", "link/../folder"):
        assert differences(settings(name, same), config) == []
    for other in ("", "other", "folder/inside", ".", "folder,folder", 3, ["folder"], None, "a\0b", "\ud800"):
        assert [found.name for found in differences(settings(name, other), config)] == [name]
    assert [found.name for found in differences(settings(name, "."), from_config_dict(settings("data.dir", "")))]


def test_a_corpus_may_be_a_list_of_paths():
    for value in (("a.txt", "b c"), ["a.txt", "b c"]):
        config = default_config()
        config.data.corpus = value
        assert from_config_dict(config) == from_config_dict(settings("data.corpus", "a.txt,b c"))
    assert from_config_dict(settings("data.corpus", ["a.txt"])) == from_config_dict(settings("data.corpus", "a.txt"))
    for wrong in (["a", 3], 3, None, {"a": 1}):
        assert_refused(settings("data.corpus", wrong), "data.corpus")
    with pytest.raises(TypeError):
        default_config().data.corpus = 3


def test_corpora_of_the_same_files_in_the_same_order_are_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = from_config_dict(settings("data.corpus", "a.txt, b/*.txt"))
    assert differences(settings("data.corpus", f"./a.txt,{tmp_path}/b/*.txt"), config) == []
    assert len(differences(settings("data.corpus", "b/*.txt,a.txt"), config)) == 1


def test_a_setting_missing_in_saved_settings_has_its_default():
    saved = to_dict(Config())
    del saved["seed"], saved["model"]["rope_theta"]
    assert differences(saved, Config()) == []
    assert len(differences(saved, Config(seed=1))) == 1


@pytest.mark.parametrize("saved", [None, [], "text", 3, {"model": None}, {"model": []}, {"data": "novels"}])
def test_damaged_saved_settings_are_refused(saved):
    with pytest.raises(UsageError, match=r"damaged: (config|model|data) must be a group"):
        differences(saved, Config())


def test_a_config_is_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().batch_size = 3


def test_tokens_per_step_counts_all_micro_batches():
    assert Config().tokens_per_step == 65_536


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_file_in_configs_builds(file):
    settings = runpy.run_path(str(file))["get_config"]()
    settings.data.corpus = settings.data.corpus or "my.txt"  # a person names the text of own_text
    config = from_config_dict(settings)
    assert isinstance(config, Config)
    assert from_config_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_the_60m_preset_has_the_settings_of_the_design():
    (file,) = (file for file in CONFIGS if file.stem == "m2_60m")
    config = from_config_dict(runpy.run_path(str(file))["get_config"]())
    assert (config.batch_size, config.grad_accum_steps, config.max_steps) == (32, 2, 50_000)
    assert [getattr(config, name) for name in INTERVALS] == [100, 300, 50]
    assert (config.max_checkpoints, config.sample.texts) == (5, 10)
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.learning_rate, optimizer.clip_norm) == ("adamw", 3e-4, 1.0)
    assert optimizer.lr_schedule == "cosine"
    assert 0 < optimizer.warmup_steps < 5000
    model = config.model
    assert (model.layers, model.heads, model.width, model.mlp_width) == (8, 8, 512, 2048)
    assert (model.context, model.vocab_size) == (1024, 50_257)
    assert config.data.corpus == "tinystories"


def test_old_names_work_in_a_config_file():
    settings = default_config()
    settings.slices = 4
    settings.max_skipped = 3
    settings.model.hidden = 384
    settings.model.dtype = "mixed"
    settings.model.update(dict(attention="cudnn", kernels="plain", loops="auto"))
    settings.optimizer.update(dict(decay="linear", decay_fraction=0.5, floor=0.0))
    settings.data.update(dict(validation=0.05, eval_windows=32))
    config = from_config_dict(settings)
    assert (config.microbatch_chunks, config.max_nonfinite_microbatches) == (4, 3)
    assert (config.model.mlp_width, config.model.precision) == (384, "bf16_matmul")
    assert config.model.implementation == "cuda"
    optimizer = config.optimizer
    assert (optimizer.lr_schedule, optimizer.lr_decay_fraction, optimizer.min_lr_ratio) == ("linear", 0.5, 0.0)
    assert (config.data.val_fraction, config.data.eval_sequences) == (0.05, 32)


@pytest.mark.parametrize(
    ("old", "implementation"),
    [
        ({"attention": "cudnn", "kernels": "fused"}, "hopper"),
        ({"attention": "plain", "kernels": "plain", "loops": "unrolled"}, "apple"),
        ({"attention": "plain", "kernels": "auto", "loops": "compiled"}, "auto"),
        ({"implementation": "cpu", "loops": "auto"}, "cpu"),
    ],
)
def test_three_old_settings_are_one_implementation(old, implementation):
    assert from_config_dict({"model": old}).model.implementation == implementation


def test_an_old_name_in_a_flag_is_refused_with_the_new_one():
    with pytest.raises(UsageError, match=r"model\.hidden is called model\.mlp_width now"):
        check_name("model.hidden")


@pytest.mark.parametrize("values", [{"dtype": "float16"}, {"attention": "flash", "loops": "unrolled"}])
def test_a_wrong_value_of_an_old_setting_is_refused(values):
    name, value = next(iter(values.items()))
    with pytest.raises(UsageError, match=rf"model\.{name} is '{value}': .*it is one of auto"):
        from_config_dict({"model": values})


@pytest.mark.parametrize("old", OLD_NAMES)
def test_a_renamed_setting_exists_and_stays_in_its_group(old):
    check_name(OLD_NAMES[old])
    assert OLD_NAMES[old].rpartition(".")[0] == old.rpartition(".")[0]


def test_a_setting_that_was_once_another_one_gets_its_value():
    old = {"optimizer": {"name": "muon", "b1": 0.8, "weight_decay": 0.3}}
    config = from_config_dict(old)
    assert (config.optimizer.muon_momentum, config.optimizer.muon_weight_decay) == (0.8, 0.3)
    assert not differences(old, config)
    now = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, b1=0.7, muon_momentum=0.95))
    changed = {change.name: (change.saved, change.value) for change in differences(old, now)}
    assert changed == {"optimizer.b1": (0.8, 0.7), "optimizer.muon_momentum": (0.8, 0.95)}
    assert not differences(to_dict(now), now)
    assert from_config_dict(to_dict(now)) == now
    assert from_config_dict({}) == Config()


@pytest.mark.parametrize("wrong", [{"model.width": 512}, {"model.hidden": 512}, {"data": {"slices": 1}}])
def test_a_name_outside_its_group_is_refused(wrong):
    assert_refused(wrong, *wrong)


def test_an_old_value_may_leave_the_default_and_the_last_old_name_wins(monkeypatch):
    old_names = {"data.first": "data.corpus", "data.second": "data.corpus"}
    monkeypatch.setattr(config_module, "OLD_NAMES", old_names)
    monkeypatch.setattr(config_module, "OLD_VALUES", {"data.second": {"auto": None, "b": "b"}})
    for values, corpus in ((("a", "b"), "b"), (("a", "auto"), "a")):
        for order in (1, -1):
            group = dict(list(zip(("first", "second"), values, strict=True))[::order])
            assert from_config_dict({"data": group}).data.corpus == corpus


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"slices": {}}, "microbatch_chunks"),
        ({"model": {"dtype": {}}}, "model.dtype"),
        ({"model": {"dtype": [1]}}, "model.dtype"),
        ({"model": {"attention": 1, "loops": "unrolled"}}, "model.attention"),
    ],
)
def test_a_value_of_another_type_under_an_old_name_is_refused(wrong, named):
    assert_refused(wrong, named)


def test_the_page_of_settings_is_that_of_the_code():
    """Run `python -m experiments.document_config > docs/configuration.md` after a change of jaxlm/config.py."""
    page = "\n".join(document_config.page()) + "\n"
    assert (REPOSITORY / "docs/configuration.md").read_text() == page


def test_the_page_has_every_setting_with_its_default_and_a_meaning():
    lines = list(document_config.page())
    for name, value in all_settings():
        (line,) = (line for line in lines if line.startswith(f"| `{name}`"))
        assert ("*fixed*" in line) == (name in FIXED)
        assert name == "sample.prompts" or f"`{value}`" in line or (value in ("", ()) and "| empty |" in line)
        assert re.search(r"\| [^|]{4,} \|$", line)
    assert "| `save_interval` | `300` | steps between checkpoints |" in lines
