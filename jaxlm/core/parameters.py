"""The table of parameters: each parameter of the decoder is declared here, once.

Drawing, counting, the optimizer's masks, the plan's parts and the names in other formats are all made from this table.
This module imports no jax, so commands can read the table before jax starts.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jaxlm.config import ModelConfig

Path = tuple[str, ...]
Params = dict[str, Any]  # nested dicts of arrays, with the paths of the table

PARTS = ("embedding", "attention", "feed-forward", "norms", "head")


@dataclass(frozen=True)
class Parameter:
    """One parameter. Those of the blocks are stacked: their shape begins with L, the number of layers."""

    path: Path  # in the tree, such as ("blocks", "query")
    shape: tuple[int, ...]  # matrices of blocks are [L, inputs, outputs]
    kind: Literal["matrix", "norm_scale", "embedding"]
    part: str  # of the model, one of PARTS: the plan adds up each
    init_std: float | None  # standard deviation of the initial values; None: they are 1
    hf_name: str  # of its tensor in a Hugging Face folder; `{layer}` in it stands for the index of the layer
    gguf_name: str  # likewise in a GGUF file
    rope_heads: int = 0  # heads whose outputs RoPE rotates: GGUF's Llama orders these rows differently

    @property
    def weight_decay(self) -> bool:
        """Whether weight decay applies to it: to all but norm scales."""
        return self.kind != "norm_scale"

    @property
    def optimizer(self) -> Literal["muon", "adam"]:
        """The optimizer that updates it under `optimizer.name = muon`: Muon is for the blocks' matrices."""
        return "muon" if self.kind == "matrix" else "adam"

    @property
    def stacked(self) -> bool:
        """Whether its first axis is L, the layers."""
        return self.path[0] == "blocks"

    @property
    def fsdp_axis(self) -> int:
        """The axis that is split over the devices of `mesh.fsdp`: neither the layers nor the vocabulary."""
        return min(1, len(self.shape) - 1)

    @property
    def hf_transposed(self) -> bool:
        """Whether other formats store it transposed: their matrices are [outputs, inputs]."""
        return self.kind == "matrix"

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    def names(self, template: str) -> list[str]:
        """`template` (hf_name or gguf_name) for each layer, or just once if it is not stacked."""
        return [template.format(layer=layer) for layer in range(self.shape[0])] if self.stacked else [template]


def parameter_table(config: ModelConfig) -> tuple[Parameter, ...]:
    """All parameters of the decoder, in the order in which they are drawn.

    The two output projections of a block, which write to the residual stream, start with a standard deviation of
    0.02 / sqrt(2 L) (GPT-2) or at zero, as `config.output_init` says.
    """
    L, D, F, V = config.layers, config.width, config.mlp_width, config.vocab_size
    kv_heads = config.kv_heads or config.heads
    K = D // config.heads
    KV = K * kv_heads
    output_std = 0.0 if config.output_init == "zero" else 0.02 / math.sqrt(2 * L)

    def matrix(name: str, inputs: int, outputs: int, part: str, hf: str, gguf: str, std: float = 0.02, heads: int = 0):
        return Parameter(("blocks", name), (L, inputs, outputs), "matrix", part, std, *in_layer(hf, gguf), heads)

    def block_norm(name: str, size: int, hf: str, gguf: str):
        return Parameter(("blocks", name), (L, size), "norm_scale", "norms", None, *in_layer(hf, gguf))

    def in_layer(hf: str, gguf: str) -> tuple[str, str]:
        return f"model.layers.{{layer}}.{hf}.weight", f"blk.{{layer}}.{gguf}.weight"

    def embedding(name: str, hf: str, gguf: str):
        return Parameter((name,), (V, D), "embedding", name, 0.02, hf, gguf)

    query_and_key_norms = (
        block_norm("query_norm", K, "self_attn.q_norm", "attn_q_norm"),
        block_norm("key_norm", K, "self_attn.k_norm", "attn_k_norm"),
    )
    table = (
        embedding("embedding", "model.embed_tokens.weight", "token_embd.weight"),
        matrix("query", D, D, "attention", "self_attn.q_proj", "attn_q", heads=config.heads),
        matrix("key", D, KV, "attention", "self_attn.k_proj", "attn_k", heads=kv_heads),
        matrix("value", D, KV, "attention", "self_attn.v_proj", "attn_v"),
        matrix("output", D, D, "attention", "self_attn.o_proj", "attn_output", output_std),
        matrix("gate", D, F, "feed-forward", "mlp.gate_proj", "ffn_gate"),
        matrix("up", D, F, "feed-forward", "mlp.up_proj", "ffn_up"),
        matrix("down", F, D, "feed-forward", "mlp.down_proj", "ffn_down", output_std),
        block_norm("attention_norm", D, "input_layernorm", "attn_norm"),
        block_norm("mlp_norm", D, "post_attention_layernorm", "ffn_norm"),
        *(query_and_key_norms if config.qk_norm else ()),
        Parameter(("norm",), (D,), "norm_scale", "norms", None, "model.norm.weight", "output_norm.weight"),
    )
    return table if config.tied else (*table, embedding("head", "lm_head.weight", "output.weight"))


def by_path(config: ModelConfig) -> dict[Path, Parameter]:
    """The table's parameters by their paths."""
    return {parameter.path: parameter for parameter in parameter_table(config)}


def tree_of(config: ModelConfig, f: Callable[[Parameter], Any]) -> Params:
    """A tree like the parameters, with f(parameter) as each leaf."""
    tree: Params = {}
    for parameter in parameter_table(config):
        group = tree.setdefault("blocks", {}) if parameter.stacked else tree
        group[parameter.path[-1]] = f(parameter)
    return tree


def leaves_by_path(tree: Mapping[str, Any], above: Path = ()) -> dict[Path, Any]:
    """The leaves of nested mappings by their paths, which start with `above`."""
    leaves: dict[Path, Any] = {}
    for name, child in tree.items():
        path = (*above, name)
        leaves |= leaves_by_path(child, path) if isinstance(child, Mapping) else {path: child}
    return leaves


def check_tree(config: ModelConfig, tree: Mapping[str, Any]) -> None:
    """Raises ValueError if a leaf of `tree` is not in the table, or one of the table is not in `tree`; it names it."""
    paths, declared = leaves_by_path(tree).keys(), by_path(config).keys()
    problems = [f"{'/'.join(path)} is not in the table of parameters" for path in sorted(paths - declared)]
    problems += [f"{'/'.join(path)} is missing" for path in sorted(declared - paths)]
    if problems:
        raise ValueError("; ".join(problems))
