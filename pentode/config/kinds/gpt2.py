"""GPT-2's shape: learned positions, LayerNorm, biases everywhere, dropout."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from pentode.config.kinds.hf import known_fields, refuse
from pentode.config.kinds.shape import Shape
from pentode.config.section import Activation, AtLeastOne, NotNegative, Probability, section
from pentode.config.validate import build


@section
class GPT2Config(Shape):
    """A GPT-2 model; nanoGPT's and the nanoGPT2 guide's too."""

    WIDTH: ClassVar[str] = "n_embd"
    HEADS: ClassVar[str] = "n_head"
    KV_HEADS: ClassVar[str] = "n_head"

    type: Literal["gpt2"] = Field("gpt2", repr=False, description="the kind; found by the other keys when left out")
    vocab_size: Annotated[int, Field(ge=-1)] = Field(50257, description="tokens in the vocabulary; -1: the data's")
    n_positions: AtLeastOne = Field(1024, description="learned positions: the longest sequence there can be")
    n_embd: AtLeastOne = Field(768, description="features of a token between blocks")
    n_layer: AtLeastOne = Field(12, description="blocks")
    n_head: AtLeastOne = Field(12, description="attention heads")
    n_inner: AtLeastOne | None = Field(None, description="features inside the MLP; null: 4 * n_embd")
    activation_function: Activation = Field(
        "gelu_new", description="activation of the MLP; gelu_new is the tanh form of GELU"
    )
    resid_pdrop: Probability = Field(0.1, description="dropout on what each block adds")
    embd_pdrop: Probability = Field(0.1, description="dropout on the embeddings")
    attn_pdrop: Probability = Field(0.1, description="dropout on the attention's probabilities")
    layer_norm_epsilon: float = Field(1e-5, gt=0, description="added to the variance in norms")
    bos_token_id: NotNegative | None = Field(50256, description="id that starts a text; written into exported models")
    eos_token_id: NotNegative | None = Field(50256, description="id that ends a text; written into exported models")
    tie_word_embeddings: bool = Field(True, description="the output projection is the token embedding")

    @property
    def num_layers(self) -> int:
        return self.n_layer

    @property
    def width(self) -> int:
        return self.n_embd

    @property
    def heads(self) -> int:
        return self.n_head

    @property
    def kv_heads(self) -> int:
        return self.n_head

    @property
    def ffn_width(self) -> int:
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    @property
    def max_positions(self) -> int:
        return self.n_positions

    @property
    def tied(self) -> bool:
        return self.tie_word_embeddings

    @property
    def matmul_parameters_per_layer(self) -> int:
        return 4 * self.width**2 + 2 * self.width * self.ffn_width  # q, k, v, out; up, down

    def parameter_count(self, vocab_size: int | None = None) -> int:
        biases = 3 * self.width + self.width + self.ffn_width + self.width  # qkv, out, up, down
        norms = 4 * self.width  # two, each with weight and bias
        tables = 1 if self.tied else 2
        return (
            self.num_layers * (self.matmul_parameters_per_layer + biases + norms)
            + 2 * self.width  # the last norm
            + self.n_positions * self.width
            + tables * self.known_vocab_size(vocab_size) * self.width
        )

    @classmethod
    def from_hf(cls, config_json: dict[str, Any]) -> Self:
        refuse(
            config_json,
            model_type=("gpt2",),
            scale_attn_weights=(True,),
            scale_attn_by_inverse_layer_idx=(False,),
            add_cross_attention=(False,),
        )
        return build(cls, known_fields(cls, config_json), where="config.json")

    def to_hf(self) -> dict[str, Any]:
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "vocab_size": self.known_vocab_size(),
            "n_positions": self.n_positions,
            "n_ctx": self.n_positions,
            "n_embd": self.n_embd,
            "n_layer": self.n_layer,
            "n_head": self.n_head,
            "n_inner": self.n_inner,
            "activation_function": self.activation_function,
            "resid_pdrop": self.resid_pdrop,
            "embd_pdrop": self.embd_pdrop,
            "attn_pdrop": self.attn_pdrop,
            "layer_norm_epsilon": self.layer_norm_epsilon,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "tie_word_embeddings": self.tie_word_embeddings,
        }
