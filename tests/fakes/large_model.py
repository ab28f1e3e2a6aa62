"""A Llama of 70 billion parameters as a hub has it: config, index and shards of which only the headers exist."""

from __future__ import annotations

import json
from math import prod

from fakes.hub import Repository

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
SHARD_BYTES = 5_000_000_000


def tensors() -> dict[str, tuple[int, ...]]:
    """Every tensor by name."""
    hidden, inner, keys, vocabulary = 8192, 28672, 1024, 128256
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for index in range(80):
        prefix = f"model.layers.{index}."
        shapes |= {
            f"{prefix}input_layernorm.weight": (hidden,),
            f"{prefix}self_attn.q_proj.weight": (hidden, hidden),
            f"{prefix}self_attn.k_proj.weight": (keys, hidden),
            f"{prefix}self_attn.v_proj.weight": (keys, hidden),
            f"{prefix}self_attn.o_proj.weight": (hidden, hidden),
            f"{prefix}post_attention_layernorm.weight": (hidden,),
            f"{prefix}mlp.gate_proj.weight": (inner, hidden),
            f"{prefix}mlp.up_proj.weight": (inner, hidden),
            f"{prefix}mlp.down_proj.weight": (hidden, inner),
        }
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def large_model() -> Repository:
    """The repository: 141 GB by its headers, of which there are a few hundred kilobytes."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    held = 0
    for name, shape in tensors().items():
        size = 2 * prod(shape)
        if held + size > SHARD_BYTES:
            shards.append({})
            held = 0
        shards[-1][name] = shape
        held += size
    files, sizes, weight_map = {"config.json": json.dumps(CONFIG).encode()}, {}, {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, at = {}, 0
        for name, shape in shard.items():
            end = at + 2 * prod(shape)
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, end]}
            at = end
        text = json.dumps(header).encode()
        files[file] = len(text).to_bytes(8, "little") + text
        sizes[file] = len(files[file]) + at
        weight_map |= dict.fromkeys(shard, file)
    files["model.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    return Repository(files, sizes=sizes)
