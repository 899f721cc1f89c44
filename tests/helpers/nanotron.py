"""Writes a checkpoint in Nanotron's format: a folder a parameter, a file a shard, its place in the header."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from pentode.config.kinds.llama import LlamaConfig

NANOTRON_KEYS = (
    "bos_token_id eos_token_id hidden_act hidden_size intermediate_size max_position_embeddings num_attention_heads "
    "num_hidden_layers num_key_value_heads pad_token_id rms_norm_eps rope_scaling rope_theta tie_word_embeddings "
    "vocab_size"
).split()
QWEN2 = {  # what its other shape says of itself by default
    "is_qwen2_config": True,
    "attention_bias": False,
    "flex_attention_mask": None,
    "log_attn_probs": True,
    "moe_config": None,
    "no_rope_layer": None,
    "ring_attn_heads_k_stride": None,
    "rope_seq_len_interpolation_factor": None,
    "sliding_window_size": None,
    "_fused_rms_norm": True,
    "_fused_rotary_emb": True,
    "_use_doc_masking": True,
    "_use_qkv_packed": True,
}


@dataclass(frozen=True)
class Layout:
    """How the run that saved was cut up, and which of Nanotron's spellings it had."""

    tp: int = 1
    pp: int = 1
    twice_named: bool = False  # model_model_weight.safetensors.safetensors
    numpy_numbers: bool = False  # np.int64(64) for 64
    qwen2: bool = False  # the shape is called a Qwen2


def write_nanotron(folder: Path, shape: LlamaConfig, theirs: Mapping[str, Tensor], layout: Layout) -> None:
    """Write a Llama, whose weights have Hugging Face's names, as Nanotron would."""
    embedding = theirs["model.embed_tokens.weight"]
    last = layout.pp - 1
    _cut(folder, "model.token_position_embeddings.pp_block.token_embedding", [embedding], 0, layout, pp=0)
    for i in range(shape.num_hidden_layers):
        here, block, pp = f"model.layers.{i}", f"model.decoder.{i}.pp_block", i * layout.pp // shape.num_hidden_layers
        qkv = [theirs[f"{here}.self_attn.{x}_proj.weight"] for x in "qkv"]
        _cut(folder, f"{block}.attn.qkv_proj", qkv, 0, layout, pp=pp)
        _cut(folder, f"{block}.attn.o_proj", [theirs[f"{here}.self_attn.o_proj.weight"]], 1, layout, pp=pp)
        gate_up = [theirs[f"{here}.mlp.{x}_proj.weight"] for x in ("gate", "up")]
        _cut(folder, f"{block}.mlp.gate_up_proj", gate_up, 0, layout, pp=pp)
        _cut(folder, f"{block}.mlp.down_proj", [theirs[f"{here}.mlp.down_proj.weight"]], 1, layout, pp=pp)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            _save(folder, f"{block}.{norm}", "", theirs[f"{here}.{norm}.weight"], {}, layout)
    _save(folder, "model.final_layer_norm.pp_block", "", theirs["model.norm.weight"], {}, layout)
    if not shape.tie_word_embeddings:
        _cut(folder, "model.lm_head.pp_block", [theirs["lm_head.weight"]], 0, layout, pp=last)
    described = {key: value for key, value in shape.to_hf().items() if key in NANOTRON_KEYS}
    described |= QWEN2 if layout.qwen2 else {"is_llama_config": True}
    described |= {"initializer_range": 0.02, "pretraining_tp": 1, "use_cache": True, "rope_interleaved": False}
    described |= {"_attn_implementation": "flash_attention_2", "z_loss_enabled": False, "z_loss_coefficient": 0.0001}
    (folder / "model_config.json").write_text(json.dumps(described))
    metas = {"consumed_train_samples": 8, "last_train_step": 2, "data_stages": []}
    sizes = {"version": "1.5", "tp": layout.tp, "dp": 2, "metas": metas, "custom_metas": None}
    (folder / "checkpoint_metadata.json").write_text(json.dumps(sizes))
    optimizer = folder / "optimizer"
    optimizer.mkdir()
    (optimizer / "optimizer_pp-0-of-1_tp-0-of-1_exp-0-of-1.pt").write_bytes(b"\x80\x04no pickle is read")


def _cut(folder: Path, module: str, pieces: list[Tensor], dim: int, layout: Layout, *, pp: int) -> None:
    """Save each tensor-parallel rank's part of every piece, joined, with the slices that say where each lies."""
    whole, tp = torch.cat(pieces), layout.tp
    for rank in range(tp):
        parts, pairs, here, there = [], [], 0, 0
        for piece in pieces:
            size = piece.shape[dim] // tp
            parts.append(piece.narrow(dim, rank * size, size))
            begin = there + rank * size
            sides = ((here, here + size), (begin, begin + size))
            pairs.append("#".join(_slices(dim, *side) for side in sides))
            here, there = here + size, there + piece.shape[dim]
        numbers = [f"np.int64({n})" if layout.numpy_numbers else str(n) for n in whole.shape]
        metadata = {
            "version": "1.4" if layout.numpy_numbers else "1.5",
            "local_global_slices_pairs": ";".join(pairs),
            "unsharded_shape": f"({', '.join(numbers)})",
        }
        suffix = f"_pp-rank-{pp}-of-{layout.pp}_tp-rank-{rank}-of-{tp}"
        _save(folder, module, suffix, torch.cat(parts, dim), metadata, layout)


def _slices(dim: int, start: int, stop: int) -> str:
    triples = ["None,None,None"] * 2
    triples[dim] = f"{start},{stop},None"
    return "|".join(triples)


def _save(folder: Path, module: str, suffix: str, tensor: Tensor, metadata: dict[str, str], layout: Layout) -> None:
    name = f"model_model_weight.safetensors{suffix}" if layout.twice_named else f"model_weight{suffix}"
    path = folder / "model" / Path(*module.split(".")) / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"data": tensor.contiguous().clone()}, path, metadata=metadata or None)
