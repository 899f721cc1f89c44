"""Llama 1, 2 and 3 (arXiv:2302.13971, 2307.09288, 2407.21783): pre-norm blocks, rotary grouped-query attention, SwiGLU.

T tokens, B sequences, S tokens in each, D width, H query heads, K key/value heads, E head size, F features of the MLP,
V vocabulary. H, K and F are this tp rank's; between the cut layers T is, under sequence parallelism.
"""

import torch
from torch import Tensor, nn

from pentode.config.kinds.llama import LlamaConfig
from pentode.dist.mesh import Mesh
from pentode.nn.attention import Attention
from pentode.nn.cache import LayerCache
from pentode.nn.causal_lm import CausalLM, Ends, Part
from pentode.nn.names import NameTable, rule
from pentode.nn.norm import RMSNorm
from pentode.nn.shared import Shared
from pentode.ops.activation import gated
from pentode.ops.feed_forward import is_fused, swiglu_layer
from pentode.ops.linear import Float8
from pentode.ops.rope import frequencies, scale_llama3
from pentode.parallel.loss import Vocab
from pentode.parallel.recompute import again
from pentode.parallel.tensor import ColumnLinear, Place, RowLinear, VocabEmbedding, VocabTable


class MLP(nn.Module):
    """onto + down(silu(gate(x)) * up(x)), with gate and up in one fused layer."""

    def __init__(self, c: LlamaConfig, place: Place) -> None:
        super().__init__()
        self.activation, self.again = c.hidden_act, place.activation_again
        self.may_fuse = c.hidden_act == "silu" and place.tp.size == 1 and place.float8 is None
        self.gate_up = ColumnLinear(c.width, (c.ffn_width, c.ffn_width), place=place)
        self.down = RowLinear(c.ffn_width, c.width, place=place)

    def forward(self, x: Tensor, *, onto: Tensor) -> Tensor:
        if self.may_fuse and is_fused(x, self.gate_up.weight):
            return swiglu_layer(x, self.gate_up.weight, self.down.weight, onto=onto, again=self.again)
        if self.again:
            return onto + again(self._down, self.gate_up(x))
        return onto + self.down(self.gate_up.gated(x, self.activation))

    def _down(self, gate_up: Tensor) -> Tensor:
        return self.down(gated(gate_up, self.activation))


class Block(nn.Module):
    """One layer: attention, then MLP, each on the normalised stream and added to it."""

    def __init__(self, c: LlamaConfig, place: Place) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(c.width, c.rms_norm_eps, place=place)
        self.attn = Attention(
            c.width,
            heads=c.heads,
            kv_heads=c.kv_heads,
            head_dim=c.head_dim,
            place=place,
            rotary="interleaved" if c.rope_interleaved else "halves",
        )
        self.mlp_norm = RMSNorm(c.width, c.rms_norm_eps, place=place)
        self.mlp = MLP(c, place)

    def forward(self, x: Tensor, shared: Shared, cache: LayerCache | None = None) -> Tensor:  # [T, D]
        x, normed = self.attn_norm.beside(x)
        x, normed = self.mlp_norm.beside(x, self.attn(normed, shared, cache))
        return self.mlp(normed, onto=x)


def build(
    c: LlamaConfig,
    mesh: Mesh,
    part: Part,
    *,
    device: torch.device,
    dtype: torch.dtype,
    vocab_size_padded: int,
    sequence_parallel: bool = False,
    gather_again: bool = False,
    overlap: bool = False,
    float8: Float8 | None = None,
    activation_again: bool = False,
    seed: int = 0,
) -> CausalLM:
    """The part of the model that a pipeline stage holds, its weights not yet initialised.

    `seed` is dropout's; the other options are those of `Place`.
    """
    place = Place(
        mesh.tp,
        device,
        dtype,
        mesh.tp_kv,
        sequence_parallel=sequence_parallel,
        gather_again=gather_again,
        overlap=overlap,
        float8=float8,
        activation_again=activation_again,
    )
    tables = {"padded": vocab_size_padded, "place": place}
    copies = mesh.ends if c.tied else None
    ends = Ends(
        embed=VocabEmbedding(c.vocab_size, c.width, **tables, shared_with=copies)
        if part.first or (part.last and c.tied)
        else None,
        positions=None,
        norm=RMSNorm(c.width, c.rms_norm_eps, place=place) if part.last else None,
        head=VocabTable(c.vocab_size, c.width, **tables) if part.last and not c.tied else None,
    )
    return CausalLM(
        part=part,
        place=place,
        width=c.width,
        vocab=Vocab(c.vocab_size, mesh.tp),
        ends=ends,
        layers={i: Block(c, place) for i in part.layers},
        frequencies=rotary_frequencies(c, dtype).to(device),
        z_loss=c.z_loss_coefficient if c.z_loss_enabled else 0.0,
        seed=seed,
    )


def rotary_frequencies(c: LlamaConfig, dtype: torch.dtype) -> Tensor:
    """Radians per position of each pair of features, in at least float32, stretched as the shape says.  # [E/2]"""
    plain = frequencies(c.head_dim, theta=c.rope_theta, dtype=torch.promote_types(dtype, torch.float32))
    scaling = c.rope_scaling
    if scaling is None or scaling.rope_type == "default":
        return plain
    if scaling.rope_type == "linear":
        return plain / scaling.factor
    return scale_llama3(
        plain,
        factor=scaling.factor,
        low_freq_factor=scaling.low_freq_factor,
        high_freq_factor=scaling.high_freq_factor,
        original_positions=scaling.original_max_position_embeddings,
    )


HF_NAMES = NameTable(
    rules=(
        rule("embed.weight", "model.embed_tokens.weight"),
        rule("layers.{}.attn_norm.weight", "model.layers.{}.input_layernorm.weight"),
        rule("layers.{}.attn.qkv.weight", *(f"model.layers.{{}}.self_attn.{x}_proj.weight" for x in "qkv")),
        rule("layers.{}.attn.out.weight", "model.layers.{}.self_attn.o_proj.weight"),
        rule("layers.{}.mlp_norm.weight", "model.layers.{}.post_attention_layernorm.weight"),
        rule("layers.{}.mlp.gate_up.weight", *(f"model.layers.{{}}.mlp.{x}_proj.weight" for x in ("gate", "up"))),
        rule("layers.{}.mlp.down.weight", "model.layers.{}.mlp.down_proj.weight"),
        rule("norm.weight", "model.norm.weight"),
        rule("head.weight", "lm_head.weight"),
    ),
    prefix="model.",
    tied=("lm_head.weight", "model.embed_tokens.weight"),
    ignored=(r".*\.rotary_emb\.inv_freq",),
)

NANOTRON_NAMES = (
    NameTable(  # of its Llama, and of its Qwen2, whose plain shapes are Llama's; q, k, v are fused there too
        rules=(
            rule("embed.weight", "model.token_position_embeddings.pp_block.token_embedding.weight"),
            *(
                rule(f"layers.{{}}.{ours}.weight", f"model.decoder.{{}}.pp_block.{theirs}.weight")
                for ours, theirs in {
                    "attn_norm": "input_layernorm",
                    "attn.qkv": "attn.qkv_proj",
                    "attn.out": "attn.o_proj",
                    "mlp_norm": "post_attention_layernorm",
                    "mlp.gate_up": "mlp.gate_up_proj",
                    "mlp.down": "mlp.down_proj",
                }.items()
            ),
            rule("norm.weight", "model.final_layer_norm.pp_block.weight"),
            rule("head.weight", "model.lm_head.pp_block.weight"),
        ),
        prefix="model.",
        tied=("model.lm_head.pp_block.weight", "model.token_position_embeddings.pp_block.token_embedding.weight"),
    )
)
