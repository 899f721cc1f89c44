"""GPT-2 (Radford et al., 2019): pre-norm blocks, learned positions, LayerNorm, biases everywhere, dropout.

T tokens, B sequences, S tokens in each, D width, H heads, E head size, F features of the MLP, V vocabulary. H and F are
this tp rank's; between the cut layers T is, under sequence parallelism.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pentode.config.kinds.gpt2 import GPT2Config
from pentode.dist.mesh import Mesh
from pentode.nn.attention import Attention
from pentode.nn.cache import LayerCache
from pentode.nn.causal_lm import CausalLM, Ends, Part
from pentode.nn.dropout import Dropout
from pentode.nn.names import NameTable, rule
from pentode.nn.norm import LayerNorm
from pentode.nn.shared import Shared
from pentode.ops.activation import ACTIVATIONS
from pentode.ops.linear import Float8
from pentode.parallel.loss import Vocab
from pentode.parallel.recompute import again
from pentode.parallel.tensor import ColumnLinear, Place, RowLinear, VocabEmbedding, VocabTable

EMBEDDING_SITE = 0  # dropouts are numbered: the embedding's, then three a block
BLOCK_SITES = 3


class Positions(nn.Module):
    """A learned vector for each position; used between cut layers, so every tp rank holds it whole."""

    def __init__(self, c: GPT2Config, place: Place) -> None:
        super().__init__()
        self.weight = place.replicated(c.n_positions, c.width)

    def forward(self, positions: Tensor) -> Tensor:
        return F.embedding(positions, self.weight)


class MLP(nn.Module):
    """down(gelu(up(x)))."""

    def __init__(self, c: GPT2Config, place: Place) -> None:
        super().__init__()
        self.activation, self.again = ACTIVATIONS[c.activation_function], place.activation_again
        self.up = ColumnLinear(c.width, (c.ffn_width,), place=place, bias=True)
        self.down = RowLinear(c.ffn_width, c.width, place=place, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return again(self._down, self.up(x)) if self.again else self._down(self.up(x))

    def _down(self, up: Tensor) -> Tensor:
        return self.down(self.activation(up))


class Block(nn.Module):
    """One layer: attention, then MLP, each on the normalised stream and added to it, with dropout on what is added."""

    def __init__(self, c: GPT2Config, place: Place, *, number: int) -> None:
        super().__init__()
        first_site = EMBEDDING_SITE + 1 + BLOCK_SITES * number
        on_probabilities, on_attention, on_mlp = (
            Dropout(p, site=first_site + i, device=place.device)
            for i, p in enumerate((c.attn_pdrop, c.resid_pdrop, c.resid_pdrop))
        )
        self.attn_norm = LayerNorm(c.width, c.layer_norm_epsilon, place=place)
        self.attn = Attention(
            c.width,
            heads=c.heads,
            kv_heads=c.kv_heads,
            head_dim=c.head_dim,
            place=place,
            bias=True,
            dropout=on_probabilities,
        )
        self.attn_dropout = on_attention
        self.mlp_norm = LayerNorm(c.width, c.layer_norm_epsilon, place=place)
        self.mlp = MLP(c, place)
        self.mlp_dropout = on_mlp

    def forward(self, x: Tensor, shared: Shared, cache: LayerCache | None = None) -> Tensor:  # [T, D]
        x, normed = self.attn_norm.beside(x)
        x, normed = self.mlp_norm.beside(x, self.attn_dropout(self.attn(normed, shared, cache), shared.local_keys))
        return x + self.mlp_dropout(self.mlp(normed), shared.local_keys)


def build(
    c: GPT2Config,
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
        positions=Positions(c, place) if part.first else None,
        norm=LayerNorm(c.width, c.layer_norm_epsilon, place=place) if part.last else None,
        head=VocabTable(c.vocab_size, c.width, **tables) if part.last and not c.tied else None,
    )
    return CausalLM(
        part=part,
        place=place,
        width=c.width,
        vocab=Vocab(c.vocab_size, mesh.tp),
        ends=ends,
        layers={i: Block(c, place, number=i) for i in part.layers},
        embed_dropout=Dropout(c.embd_pdrop, site=EMBEDDING_SITE, device=device),
        seed=seed,
    )


_BLOCK_TENSORS = {  # ours -> theirs
    "attn_norm": "ln_1",
    "attn.qkv": "attn.c_attn",  # q, k and v already stand side by side there
    "attn.out": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}

HF_NAMES = NameTable(
    rules=(
        rule("embed.weight", "transformer.wte.weight"),
        rule("positions.weight", "transformer.wpe.weight"),
        *(
            rule(f"layers.{{}}.{ours}.weight", f"transformer.h.{{}}.{theirs}.weight", transposed="norm" not in ours)
            for ours, theirs in _BLOCK_TENSORS.items()
        ),
        *(
            rule(f"layers.{{}}.{ours}.bias", f"transformer.h.{{}}.{theirs}.bias")
            for ours, theirs in _BLOCK_TENSORS.items()
        ),
        rule("norm.weight", "transformer.ln_f.weight"),
        rule("norm.bias", "transformer.ln_f.bias"),
        rule("head.weight", "lm_head.weight"),
    ),
    prefix="transformer.",
    tied=("lm_head.weight", "transformer.wte.weight"),
    ignored=(r".*\.attn\.(bias|masked_bias)",),  # the causal mask, in files of former versions
)
