from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.errors import ModelError
from quantkit.model.gguf_families import FAMILIES
from quantkit.model.gguf_file import TensorInfo
from quantkit.model.gguf_losses import loss_notes
from quantkit.model.gguf_names import deinterleave, interleave, to_gguf, to_hf
from quantkit.model.gguf_rope import llama3_factors, rope_parameters
from quantkit.model.gguf_source import GGUFSource
from quantkit.model.gguf_tokenizer import PRE_TOKENIZERS, build_tokenizer, pre_tokenizer

HEADS, KV_HEADS = 4, 2
RENAMED = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers": "blk",
}


def _permuted(rows: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """As llama.cpp's converter permutes."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(
    folder: Path, out: Path, type_name: str, *, leave_out: str = "", keys: dict[str, Any] | None = None
) -> dict[str, np.ndarray[Any, Any]]:
    """The tiny Llama of a folder as gguf-py writes it, and the values each Hugging Face tensor then has."""
    writer = gguf.GGUFWriter(out, "llama")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    special = {token["id"] for token in tokenizer["added_tokens"]}
    writer.add_block_count(2)
    writer.add_context_length(256)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.__getitem__))
    writer.add_token_types([3 if number in special else 1 for number in range(len(vocabulary))])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    for key, value in (keys or {}).items():
        writer.add_string(key, value)
    values = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        data = tensor.float().numpy()
        kind = gguf.GGMLQuantizationType.F32 if data.ndim == 1 else gguf.GGMLQuantizationType[type_name]
        if name.startswith("model.embed") or name.startswith("lm_head"):
            kind = gguf.GGMLQuantizationType.Q8_0
        coded = gguf.quantize(data, kind)
        values[name] = gguf.dequantize(coded, kind).reshape(data.shape)
        if "q_proj" in name or "k_proj" in name:
            data = _permuted(data, HEADS if "q_proj" in name else KV_HEADS)
            coded = gguf.quantize(data, kind)
        stored_name = name
        for old, new in RENAMED.items():
            stored_name = stored_name.replace(old, new)
        if stored_name != leave_out:
            writer.add_tensor(stored_name, coded, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


@pytest.mark.parametrize(
    ("type_name", "dtype"),
    [("Q4_1", torch.float16), ("F16", torch.float16), ("BF16", torch.bfloat16), ("F32", torch.float32)],
)
def test_reads_names_rows_and_values(tiny_llama: Path, tmp_path: Path, type_name: str, dtype: torch.dtype) -> None:
    expected = write_gguf(tiny_llama, tmp_path / "m.gguf", type_name)
    source = GGUFSource(tmp_path / "m.gguf")
    assert sorted(source.names()) == sorted(expected)
    for name, values in expected.items():
        assert source.shape(name) == values.shape
        assert source.dtype(name) == dtype
        read = source.read(name)
        assert read.dtype == dtype
        assert torch.equal(read, torch.from_numpy(values.copy()).to(dtype)), name
        parts = list(source.in_parts(name, 7))
        assert len(parts) == -(-len(read) // 7) and torch.equal(torch.cat(parts), read), name
    assert not source.tied_head


def test_config_is_that_of_the_model(tiny_llama: Path, tmp_path: Path) -> None:
    write_gguf(tiny_llama, tmp_path / "m.gguf", "Q4_0")
    config = GGUFSource(tmp_path / "m.gguf").config
    original = json.loads((tiny_llama / "config.json").read_text())
    same = ("architectures", "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act")
    same += ("num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "vocab_size")
    same += ("max_position_embeddings", "tie_word_embeddings", "attention_bias", "mlp_bias")
    assert {key: config[key] for key in same} == {key: original[key] for key in same}
    assert rope_parameters(config) == rope_parameters(original)
    assert (config["bos_token_id"], config["eos_token_id"], config["dtype"]) == (0, 0, "float16")


def test_notes_and_lineage_say_what_was_lost(tiny_llama: Path, tmp_path: Path) -> None:
    write_gguf(tiny_llama, tmp_path / "m.gguf", "Q4_1")
    source = GGUFSource(tmp_path / "m.gguf")
    assert source.notes[0] == "dequantized Q4_1 baseline"
    # 14 linears of 73728 weights, embedding and head of 24576 each, 5 norms of 64: at 5, 8.5 and 32 bits
    assert "Q4_1 59.8%, Q8_0 39.9%, F32 0.3% of the weights, 6.47 bits a weight; what that lost" in source.notes[1]
    assert "every loss is counted against this file" in source.notes[1]
    lineage = source.lineage()
    assert lineage["types"] == {"F32": 5, "Q4_1": 14, "Q8_0": 2}
    assert lineage["files"][0]["bytes"] == (tmp_path / "m.gguf").stat().st_size
    write_gguf(tiny_llama, tmp_path / "f.gguf", "F16")
    assert GGUFSource(tmp_path / "f.gguf").notes[0] == "partly dequantized Q8_0 baseline"  # embedding and head


def test_losses_name_the_importance_matrix_and_a_quantized_embedding() -> None:
    infos = [
        TensorInfo("token_embd.weight", (1024, 32), "Q8_0", 0, 1024 * 34),
        TensorInfo("blk.0.ffn_up.weight", (1024, 32), "F16", 0, 1024 * 64),
    ]
    first, second = loss_notes(infos, "F16", {"quantize.imatrix.dataset": "wiki.txt"})
    assert first == "partly dequantized Q8_0 baseline"
    assert "12.25 bits a weight; rounded with an importance matrix (wiki.txt); what" in second
    assert loss_notes(infos[1:], "F16", {}) == ()


def test_a_file_without_head_is_tied(tiny_llama: Path, tmp_path: Path) -> None:
    write_gguf(tiny_llama, tmp_path / "m.gguf", "F16", leave_out="output.weight")
    source = GGUFSource(tmp_path / "m.gguf")
    assert source.tied_head
    assert source.config["tie_word_embeddings"] is True


def test_tokenizer_files_give_the_same_ids(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    write_gguf(tiny_llama, tmp_path / "m.gguf", "F16", keys={"tokenizer.chat_template": "{{ messages[0]['content'] }}"})
    source = GGUFSource(tmp_path / "m.gguf")
    folder = source.tokenizer_folder()
    assert folder == source.tokenizer_folder()
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= {
        p.name for p in source.side_files()
    }
    original, made = AutoTokenizer.from_pretrained(tiny_llama), AutoTokenizer.from_pretrained(folder)
    for text in ("Hello,  world 123!\n", "<|im_start|>user\nhi<|im_end|>", "naïve 😀"):
        assert made(text).input_ids == original(text).input_ids
        assert made.decode(made(text).input_ids) == text
    assert made.eos_token == "<|endoftext|>"
    assert made.all_special_ids == original.all_special_ids[:1]
    assert made.apply_chat_template([{"role": "user", "content": "hey"}], tokenize=False) == "hey"
    assert json.loads((folder / "generation_config.json").read_text()) == {"bos_token_id": 0, "eos_token_id": 0}


def test_digits_stand_alone_where_the_file_says_smollm(tiny_llama: Path, tmp_path: Path) -> None:
    write_gguf(tiny_llama, tmp_path / "m.gguf", "F16")
    metadata = dict(GGUFSource(tmp_path / "m.gguf").file.metadata)
    metadata["tokenizer.ggml.pre"] = "smollm"
    assert build_tokenizer(metadata, "m").encode("in 2024").tokens[-4:] == ["2", "0", "2", "4"]


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "in 1234567 I'LL", ["in", "Ġ1234567", "ĠI", "'", "LL"]),
        ("smollm", "in 12 x1", ["in", "Ġ", "1", "2", "Ġx", "1"]),
        ("llama-bpe", "in 1234567 I'LL", ["in", "Ġ", "123", "456", "7", "ĠI", "'LL"]),
        ("qwen2", "in 123 I'LL\n\n", ["in", "Ġ", "1", "2", "3", "ĠI", "'LL", "ĊĊ"]),
    ],
)
def test_how_each_pre_tokenizer_cuts(pre: str, text: str, pieces: list[str]) -> None:
    cut = PRE_TOKENIZERS[pre].build().pre_tokenize_str(text)
    assert [piece for piece, _ in cut] == pieces


def test_an_unknown_pre_tokenizer_is_an_error() -> None:
    with pytest.raises(
        ModelError, match=r"m\.gguf: tokenizer\.ggml\.pre: novel is not supported; expected one of gpt-2"
    ):
        pre_tokenizer("novel", "m.gguf")


def test_damaged_files_are_one_message_each(tiny_llama: Path, tmp_path: Path) -> None:
    whole = tmp_path / "m.gguf"
    write_gguf(tiny_llama, whole, "Q8_0")
    data = whole.read_bytes()
    cut = tmp_path / "cut.gguf"
    for keep in (0, 3, 10, 30, 200, 4000, len(data) // 2, len(data) - 100):
        cut.write_bytes(data[:keep])
        with pytest.raises(ModelError, match="cut.gguf: ") as caught:
            GGUFSource(cut)
        assert "\n" not in caught.value.message
    cut.write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match=rf"lie beyond the end of the file.*found {len(data) // 2}"):
        GGUFSource(cut)
    cut.write_bytes(b"GGUF" + (9).to_bytes(4, "little") + data[8:])
    with pytest.raises(ModelError, match="GGUF version 9; expected 2 or 3"):
        GGUFSource(cut)
    cut.write_bytes(b"PK\x03\x04" + data[4:])
    with pytest.raises(ModelError, match="is not a GGUF file"):
        GGUFSource(cut)
    with pytest.raises(ModelError, match="cannot be read"):
        GGUFSource(tmp_path / "missing.gguf")
    # a count of strings that no file of this size can hold must not be believed
    cut.write_bytes(data[:16] + (1 << 60).to_bytes(8, "little") + data[24:])
    with pytest.raises(ModelError, match="cut.gguf"):
        GGUFSource(cut)


def test_other_architectures_and_tensors_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    write_gguf(tiny_llama, tmp_path / "m.gguf", "F16")
    data = (tmp_path / "m.gguf").read_bytes()
    other = tmp_path / "other.gguf"
    other.write_bytes(data.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0mamba", 1))
    with pytest.raises(
        ModelError, match=r"general\.architecture: mamba is not supported; expected one of llama, qwen2"
    ):
        GGUFSource(other)
    other.write_bytes(data.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight", 1))
    with pytest.raises(ModelError, match=r"1 tensors are not those of a plain llama: blk\.1\.ffn_xx\.weight"):
        GGUFSource(other)
    with pytest.raises(ModelError, match="holds no tensor nothing"):
        GGUFSource(tmp_path / "m.gguf").shape("nothing")


def test_names_go_both_ways() -> None:
    llama = FAMILIES[0]
    assert to_gguf("model.layers.7.self_attn.k_norm.weight", llama) == "blk.7.attn_k_norm.weight"
    assert to_hf("blk.12.attn_output.bias", llama) == "model.layers.12.self_attn.o_proj.bias"
    assert to_gguf("model.layers.0.self_attn.rotary_emb.inv_freq", llama) is None
    assert to_hf("blk.0.ffn_gate_exps.weight", llama) is None
    for family in FAMILIES:
        for inside in family.names.inside:
            name = f"{family.names.block}.3.{inside}.weight"
            assert to_hf(str(to_gguf(name, family)), family) == name


def test_rotary_rows_alternate_in_the_file() -> None:
    assert interleave(1, 6).tolist() == [0, 3, 1, 4, 2, 5]
    assert torch.equal(interleave(4, 64)[deinterleave(4, 64)], torch.arange(64))
    rows = np.arange(2 * 8 * 3).reshape(16, 3)
    assert (torch.from_numpy(rows)[interleave(2, 16)].numpy() == _permuted(rows, 2)).all()


def test_llama3_factors_are_those_of_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = LlamaConfig(hidden_size=256, num_attention_heads=4, rope_parameters=rope, max_position_embeddings=131072)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1.0 / (500000.0 ** (torch.arange(0, 64, 2).float() / 64))
    torch.testing.assert_close(llama3_factors(rope, 64), plain / scaled, rtol=1e-5, atol=0)


def test_values_beyond_float16(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "large"
    folder.mkdir()
    tensors = load_file(tiny_llama / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1e6
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"] * 1e7
    save_file(tensors, folder / "model.safetensors")
    (folder / "tokenizer.json").write_text((tiny_llama / "tokenizer.json").read_text())
    write_gguf(folder, tmp_path / "m.gguf", "Q8_0")
    source = GGUFSource(tmp_path / "m.gguf")
    assert source.dtype("model.norm.weight") == torch.float32
    assert torch.equal(source.read("model.norm.weight"), tensors["model.norm.weight"])
    assert source.dtype("model.layers.0.input_layernorm.weight") == torch.float16
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.up_proj\.weight: values up to .* do not fit float16"):
        source.read("model.layers.0.mlp.up_proj.weight")


@pytest.mark.parametrize(
    ("metadata", "card"),
    [
        ({}, {}),
        (
            {"general.license": "other", "general.license.name": "tiny", "general.languages": ["en"]},
            {"license": "other", "license_name": "tiny", "language": ["en"]},
        ),
        ({"general.source.repo_url": "https://huggingface.co/acme/tiny"}, {"base_model": "acme/tiny"}),
        ({"general.source.huggingface.repository": "acme/tiny"}, {"base_model": "acme/tiny"}),
        ({"general.source.url": "https://example.org/acme/tiny"}, {}),
        # what the source itself was made from is not the source
        ({"general.base_model.0.repo_url": "https://huggingface.co/acme/pretrained"}, {}),
    ],
)
def test_a_file_says_what_a_card_would(metadata: dict[str, Any], card: dict[str, Any]) -> None:
    assert GGUFSource.card(SimpleNamespace(file=SimpleNamespace(metadata=metadata))) == card  # type: ignore[arg-type]
