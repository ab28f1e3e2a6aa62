"""The families of models that GGUF files are written for and read as, as data: names, keys and what llama.cpp assumes.

Source: llama.cpp, the loader of each architecture (src/models) and its converter from Hugging Face folders.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Names:
    """Modules by Hugging Face name and what GGUF calls them, in the order of the file.

    block: what stands before the number of a block in Hugging Face names; GGUF says blk. outside, inside: modules
    beside the blocks and of one block.
    """

    block: str
    outside: Mapping[str, str]
    inside: Mapping[str, str]


@dataclass(frozen=True)
class Key:
    """A number that the config and the file's metadata both hold.

    gguf: without the architecture before it. default: what a config means that lacks it or holds null; None: it must be
    there. absent: what the file holds in that case where llama.cpp wants the key all the same, and is read as null.
    """

    gguf: str
    hf: str
    kind: type[int] | type[float] = int
    default: Callable[[Mapping[str, Any]], float] | None = None
    absent: int | None = None


@dataclass(frozen=True)
class Family:
    """A GGUF architecture and the Hugging Face model it is.

    interleaved: rotary pairs are neighbouring rows of the q and k projections (Hugging Face keeps halves), so those
    rows are permuted in the file. fixed: settings of the config that llama.cpp
    computes with whatever the file says. norm_offset: what the file adds to the gain of every normalization.
    ropes: ways to scale rotary positions that llama.cpp computes as transformers does. hidden_heads: the heads together
    are as wide as the hidden states. partial_rotary: part of a head's channels may be rotated. window_period: of so
    many blocks the last attends to everything, the others by a window; None when llama.cpp knows no windows here.
    local_theta: the rotary base of blocks with a window has a key of its own. scalar_layers: number of blocks of the
    one size whose attention llama.cpp divides by the root of hidden size over heads; the others' by that of a head's
    channels. context_key: where the config says how long a text may be. transposed: Hugging Face keeps the linears of
    the blocks as [in, out].
    """

    architecture: str
    hf_class: str
    model_type: str
    names: Names
    keys: tuple[Key, ...]
    interleaved: bool = False
    fixed: Mapping[str, Any] = field(default_factory=lambda: {"hidden_act": "silu"})
    norm_offset: float = 0.0
    ropes: tuple[str, ...] = ("default", "linear", "yarn")
    hidden_heads: bool = False
    partial_rotary: bool = False
    window_period: int | None = None
    local_theta: bool = False
    scalar_layers: int | None = None
    context_key: str = "max_position_embeddings"
    transposed: bool = False


_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}

_LLAMA_NAMES = Names(
    "model.layers",
    _OUTSIDE,
    {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    },
)

_GEMMA2_NAMES = Names(
    "model.layers",
    {"model.embed_tokens": "token_embd", "model.norm": "output_norm"},  # the head is always the embedding
    {
        **_LLAMA_NAMES.inside,
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
)

_GEMMA3_NAMES = Names("model.layers", _OUTSIDE, _GEMMA2_NAMES.inside)

_PHI3_NAMES = Names(
    "model.layers",
    _OUTSIDE,
    {
        "input_layernorm": "attn_norm",
        "self_attn.qkv_proj": "attn_qkv",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_up_proj": "ffn_up",  # llama.cpp, too, takes the gate from the first half of the rows
        "mlp.down_proj": "ffn_down",
    },
)

_GPT2_NAMES = Names(
    "transformer.h",
    {
        "transformer.wte": "token_embd",
        "transformer.wpe": "position_embd",
        "transformer.ln_f": "output_norm",
        "lm_head": "output",
    },
    {
        "ln_1": "attn_norm",
        "attn.c_attn": "attn_qkv",
        "attn.c_proj": "attn_output",
        "ln_2": "ffn_norm",
        "mlp.c_fc": "ffn_up",
        "mlp.c_proj": "ffn_down",
    },
)

_KEYS = (
    Key("block_count", "num_hidden_layers"),
    Key("embedding_length", "hidden_size"),
    Key("feed_forward_length", "intermediate_size"),
    Key("attention.head_count", "num_attention_heads"),
    Key("attention.head_count_kv", "num_key_value_heads", default=lambda config: config["num_attention_heads"]),
    Key("attention.layer_norm_rms_epsilon", "rms_norm_eps", float),
)
_GPT2_KEYS = (
    Key("block_count", "n_layer"),
    Key("embedding_length", "n_embd"),
    Key("feed_forward_length", "n_inner", default=lambda config: 4 * config["n_embd"]),
    Key("attention.head_count", "n_head"),
    Key("attention.layer_norm_epsilon", "layer_norm_epsilon", float),
)
_WINDOW = Key("attention.sliding_window", "sliding_window")
_CAPS = (
    Key("attn_logit_softcapping", "attn_logit_softcapping", float),
    Key("final_logit_softcapping", "final_logit_softcapping", float),
)
_GEMMA_FIXED: dict[str, Any] = {
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "use_bidirectional_attention": None,
}
_ALL_ROPES = ("default", "linear", "yarn", "llama3")

FAMILIES = (
    Family("llama", "LlamaForCausalLM", "llama", _LLAMA_NAMES, _KEYS, interleaved=True, ropes=_ALL_ROPES),
    Family(
        "llama",
        "MistralForCausalLM",
        "mistral",
        _LLAMA_NAMES,
        _KEYS,
        interleaved=True,
        ropes=_ALL_ROPES,
    ),
    Family("qwen2", "Qwen2ForCausalLM", "qwen2", _LLAMA_NAMES, _KEYS, hidden_heads=True),
    Family(
        "qwen3", "Qwen3ForCausalLM", "qwen3", _LLAMA_NAMES, _KEYS, fixed={"hidden_act": "silu", "attention_bias": False}
    ),
    Family(
        "gemma2",
        "Gemma2ForCausalLM",
        "gemma2",
        _GEMMA2_NAMES,
        (*_KEYS, _WINDOW, *_CAPS),
        norm_offset=1.0,
        ropes=("default", "linear"),
        window_period=2,
        scalar_layers=46,
        fixed=_GEMMA_FIXED,
    ),
    Family(
        "gemma3",
        "Gemma3ForCausalLM",
        "gemma3_text",
        _GEMMA3_NAMES,
        (*_KEYS, _WINDOW),
        norm_offset=1.0,
        ropes=("default", "linear"),
        window_period=6,
        local_theta=True,
        scalar_layers=62,
        fixed=_GEMMA_FIXED | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    Family(
        "phi3",
        "Phi3ForCausalLM",
        "phi3",
        _PHI3_NAMES,
        (*_KEYS, Key("attention.sliding_window", "sliding_window", absent=0)),  # read, and then not followed
        ropes=("default", "longrope"),
        hidden_heads=True,
        partial_rotary=True,
    ),
    Family(
        "gpt2",
        "GPT2LMHeadModel",
        "gpt2",
        _GPT2_NAMES,
        _GPT2_KEYS,
        fixed={
            "activation_function": "gelu_new",
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
        ropes=(),
        context_key="n_positions",
        transposed=True,
    ),
)
"""The first entry of an architecture is what a file of it is read as: a Mistral is a Llama in every computation."""
