import jax
import pytest

from jaxlm.config import ModelConfig
from jaxlm.core.decoder import init_params
from jaxlm.core.parameters import PARTS, check_tree, leaves_by_path, parameter_table, tree_of

TINY = {"vocab_size": 11, "context": 5, "layers": 3, "heads": 4, "width": 16, "mlp_width": 24}

# path: shape, first standard deviation, part, decayed, Muon's, names in Hugging Face and GGUF, heads that RoPE rotates
PRESET = {
    "embedding": ((50257, 512), 0.02, "embedding", True, False, "model.embed_tokens.weight", "token_embd.weight", 0),
    "blocks/query": ((8, 512, 512), 0.02, "attention", True, True, "self_attn.q_proj", "attn_q", 8),
    "blocks/key": ((8, 512, 512), 0.02, "attention", True, True, "self_attn.k_proj", "attn_k", 8),
    "blocks/value": ((8, 512, 512), 0.02, "attention", True, True, "self_attn.v_proj", "attn_v", 0),
    "blocks/output": ((8, 512, 512), 0.005, "attention", True, True, "self_attn.o_proj", "attn_output", 0),
    "blocks/gate": ((8, 512, 2048), 0.02, "feed-forward", True, True, "mlp.gate_proj", "ffn_gate", 0),
    "blocks/up": ((8, 512, 2048), 0.02, "feed-forward", True, True, "mlp.up_proj", "ffn_up", 0),
    "blocks/down": ((8, 2048, 512), 0.005, "feed-forward", True, True, "mlp.down_proj", "ffn_down", 0),
    "blocks/attention_norm": ((8, 512), None, "norms", False, False, "input_layernorm", "attn_norm", 0),
    "blocks/mlp_norm": ((8, 512), None, "norms", False, False, "post_attention_layernorm", "ffn_norm", 0),
    "norm": ((512,), None, "norms", False, False, "model.norm.weight", "output_norm.weight", 0),
}


def test_the_presets_table():
    table = parameter_table(ModelConfig())
    assert ["/".join(p.path) for p in table] == list(PRESET)
    for p, (path, (shape, std, part, decayed, by_muon, hf, gguf, heads)) in zip(table, PRESET.items(), strict=True):
        if path.startswith("blocks/"):
            hf, gguf = f"model.layers.{{layer}}.{hf}.weight", f"blk.{{layer}}.{gguf}.weight"
        assert (p.shape, p.init_std, p.part, p.weight_decay) == (shape, std, part, decayed), path
        assert (p.optimizer, p.hf_name, p.gguf_name, p.rope_heads) == ("muon" if by_muon else "adam", hf, gguf, heads)
        assert p.hf_transposed == by_muon
        assert p.part in PARTS
    assert sum(p.size for p in table) == 59_294_720


def test_the_norms_of_queries_and_keys():
    table, plain = (parameter_table(ModelConfig(qk_norm=qk_norm, kv_heads=2)) for qk_norm in (True, False))
    added = [p for p in table if p not in plain]
    assert [p for p in table if p in plain] == list(plain)
    assert [(p.path, p.shape, p.hf_name, p.gguf_name) for p in added] == [
        (
            ("blocks", f"{name}_norm"),
            (8, 64),
            f"model.layers.{{layer}}.self_attn.{name[0]}_norm.weight",
            f"blk.{{layer}}.attn_{name[0]}_norm.weight",
        )
        for name in ("query", "key")
    ]
    assert {(p.kind, p.part, p.init_std, p.rope_heads) for p in added} == {("norm_scale", "norms", None, 0)}


@pytest.mark.parametrize(
    "settings",
    [{"tied": False, "kv_heads": 2, "output_init": "zero", "qk_norm": True}, pytest.param({}, marks=pytest.mark.slow)],
)
def test_the_tree_that_is_drawn_is_the_tables(settings):
    config = ModelConfig(**TINY, **settings)
    params = init_params(config, jax.random.key(0))
    assert jax.tree.map(lambda leaf: leaf.shape, params) == tree_of(config, lambda p: p.shape)
    leaves = leaves_by_path(jax.device_get(params))
    for p in parameter_table(config):
        expected_std = p.init_std or 0
        assert float(leaves[p.path].std()) == pytest.approx(expected_std, rel=0.2), p.path
        assert (leaves[p.path] == 1).all() == (p.kind == "norm_scale")
    check_tree(config, params)


def test_names_of_each_layer():
    by_name = {p.path[-1]: p for p in parameter_table(ModelConfig(**TINY))}
    assert by_name["down"].names(by_name["down"].gguf_name)[2] == "blk.2.ffn_down.weight"
    assert len(by_name["down"].names(by_name["down"].hf_name)) == 3
    assert by_name["norm"].names(by_name["norm"].hf_name) == ["model.norm.weight"]


def test_a_leaf_that_is_not_in_the_table_or_missing_is_an_error_that_names_it():
    config = ModelConfig(**TINY)
    params = tree_of(config, lambda p: 0)
    with pytest.raises(ValueError, match="blocks/bias is not in the table"):
        check_tree(config, params | {"blocks": params["blocks"] | {"bias": 0}})
    with pytest.raises(ValueError, match="head is not in the table"):
        check_tree(config, params | {"head": 0})
    with pytest.raises(ValueError, match="norm is missing"):
        check_tree(config, {name: leaf for name, leaf in params.items() if name != "norm"})
