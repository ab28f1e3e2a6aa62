"""Write a Llama checkpoint of random bfloat16 weights, a tensor at a time, for measurements of time and memory.

usage: python benchmarks/random_llama.py FOLDER [--layers 16] [--hidden 2048] [--inner 8192] [--seed 0]

The default has 2.2 GB in five shards. Its weights mean nothing: what a quantizer does to them takes as long as it
would on real ones, and its memory is that of a model of this shape.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from quantkit.formats.safetensors_stream import SafetensorsStream

VOCABULARY = 32000
HEAD_DIM = 64
SHARD_BYTES = 500_000_000
DEVIATION = 0.02
"""Of the weights: transformers' own initializer_range."""


def shapes(layers: int, hidden: int, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor, in the order in which they are stored; the head is not tied."""
    keys = hidden // 4  # four query heads share a key head
    yield "model.embed_tokens.weight", (VOCABULARY, hidden)
    for index in range(layers):
        prefix = f"model.layers.{index}."
        yield f"{prefix}input_layernorm.weight", (hidden,)
        yield f"{prefix}self_attn.q_proj.weight", (hidden, hidden)
        yield f"{prefix}self_attn.k_proj.weight", (keys, hidden)
        yield f"{prefix}self_attn.v_proj.weight", (keys, hidden)
        yield f"{prefix}self_attn.o_proj.weight", (hidden, hidden)
        yield f"{prefix}post_attention_layernorm.weight", (hidden,)
        yield f"{prefix}mlp.gate_proj.weight", (inner, hidden)
        yield f"{prefix}mlp.up_proj.weight", (inner, hidden)
        yield f"{prefix}mlp.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (VOCABULARY, hidden)


def write_tokenizer(folder: Path) -> None:
    """A small byte-level BPE, trained on the text that every Python carries: GGUF files hold one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([topics[key] for key in sorted(topics)], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def write(folder: Path, layers: int, hidden: int, inner: int, seed: int) -> None:
    """The whole folder. Memory stays at the largest tensor."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // HEAD_DIM,
        "num_key_value_heads": hidden // HEAD_DIM // 4,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_tokenizer(folder)
    generator = torch.Generator().manual_seed(seed)
    tensors = list(shapes(layers, hidden, inner))
    stream = SafetensorsStream(folder, [name for name, _ in tensors], SHARD_BYTES)
    for name, shape in tensors:
        if len(shape) == 1:
            tensor = torch.ones(shape, dtype=torch.bfloat16)
        else:
            tensor = torch.empty(shape, dtype=torch.bfloat16).normal_(0, DEVIATION, generator=generator)
        stream.add({name: tensor})
    stream.finish()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=8192)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    write(given.folder, given.layers, given.hidden, given.inner, given.seed)
