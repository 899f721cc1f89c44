"""The Llama family's shape: RMSNorm, rotary positions, gated MLP, grouped key/value heads, no biases."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from pentode.config.kinds.hf import known_fields, refuse
from pentode.config.kinds.shape import Shape
from pentode.config.section import Activation, AtLeastOne, NotNegative, section
from pentode.config.validate import build
from pentode.errors import ConfigError


@section
class RopeScaling:
    """How rotary angles are stretched beyond the positions that the model was first trained on."""

    rope_type: Literal["default", "linear", "llama3"] = Field(
        "default", description="default: as they are; linear: positions / factor; llama3: low frequencies / factor"
    )
    factor: float = Field(1.0, ge=1, description="how many times longer the context becomes (linear, llama3)")
    low_freq_factor: float = Field(1.0, gt=0, description="llama3: waves longer than original / this are stretched")
    high_freq_factor: float = Field(4.0, gt=0, description="llama3: waves shorter than original / this stay")
    original_max_position_embeddings: AtLeastOne = Field(8192, description="llama3: positions before stretching")


@section
class LlamaConfig(Shape):
    """A Llama 1, 2 or 3.x model."""

    WIDTH: ClassVar[str] = "hidden_size"
    HEADS: ClassVar[str] = "num_attention_heads"
    KV_HEADS: ClassVar[str] = "num_key_value_heads"

    type: Literal["llama"] = Field("llama", repr=False, description="the kind; found by the other keys when left out")
    bos_token_id: NotNegative | None = Field(1, description="id that starts a text; written into exported models")
    eos_token_id: NotNegative | None = Field(2, description="id that ends a text; written into exported models")
    hidden_act: Activation = Field("silu", description="activation of the gated MLP")
    hidden_size: AtLeastOne = Field(4096, description="features of a token between blocks")
    intermediate_size: AtLeastOne = Field(11008, description="features inside the MLP")
    max_position_embeddings: AtLeastOne = Field(2048, description="longest sequence meant; longer ones give a warning")
    num_attention_heads: AtLeastOne = Field(32, description="query heads")
    num_hidden_layers: AtLeastOne = Field(32, description="blocks")
    num_key_value_heads: AtLeastOne | None = Field(None, description="key/value heads; null: as many as query heads")
    pad_token_id: NotNegative | None = Field(None, description="id of padding; written into exported models")
    rms_norm_eps: float = Field(1e-6, gt=0, description="added to the mean square in norms")
    rope_scaling: RopeScaling | None = Field(None, description="rotary scaling, as Llama 3.x has it")
    rope_theta: float = Field(10000.0, gt=0, description="base of the rotary wavelengths")
    rope_interleaved: bool = Field(False, description="rotate neighbours (2i, 2i+1) instead of halves")
    tie_word_embeddings: bool = Field(False, description="the output projection is the token embedding")
    vocab_size: Annotated[int, Field(ge=-1)] = Field(32000, description="tokens in the vocabulary; -1: the data's")
    z_loss_enabled: bool = Field(False, description="add z_loss_coefficient * logsumexp(logits)^2 to the loss")
    z_loss_coefficient: float = Field(1e-4, ge=0, description="weight of the z-loss")

    @property
    def num_layers(self) -> int:
        return self.num_hidden_layers

    @property
    def width(self) -> int:
        return self.hidden_size

    @property
    def heads(self) -> int:
        return self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        return self.num_attention_heads if self.num_key_value_heads is None else self.num_key_value_heads

    @property
    def ffn_width(self) -> int:
        return self.intermediate_size

    @property
    def max_positions(self) -> int:
        return self.max_position_embeddings

    @property
    def tied(self) -> bool:
        return self.tie_word_embeddings

    @property
    def matmul_parameters_per_layer(self) -> int:
        attention = self.width * self.head_dim * (2 * self.heads + 2 * self.kv_heads)  # q and out, k and v
        return attention + 3 * self.width * self.ffn_width  # gate, up, down

    def parameter_count(self, vocab_size: int | None = None) -> int:
        norms = (2 * self.num_layers + 1) * self.width
        tables = 1 if self.tied else 2
        return (
            self.num_layers * self.matmul_parameters_per_layer
            + norms
            + tables * self.known_vocab_size(vocab_size) * self.width
        )

    @classmethod
    def from_hf(cls, config_json: dict[str, Any]) -> Self:
        rope = config_json.get("rope_parameters") or config_json.get("rope_scaling") or {}  # transformers 5, and before
        rope = dict(rope)
        theta = rope.pop("rope_theta", None) or config_json.get("rope_theta", 10000.0)
        if "type" in rope:
            rope["rope_type"] = rope.pop("type")
        plain = rope.get("rope_type", "default") == "default"
        width, heads = config_json.get("hidden_size", 4096), config_json.get("num_attention_heads", 32)
        refuse(
            config_json,
            model_type=("llama",),
            attention_bias=(False, None),
            mlp_bias=(False, None),
            head_dim=(width // heads, None),
        )
        fields = known_fields(cls, config_json) | {"rope_theta": theta, "rope_scaling": None if plain else rope}
        return build(cls, fields, where="config.json")

    def to_hf(self) -> dict[str, Any]:
        if self.rope_interleaved:
            where = "model.model_config.rope_interleaved"
            raise ConfigError([f"{where}: true has no form in Hugging Face's Llama, which rotates halves"])
        scaling: dict[str, Any] | None = None
        if self.rope_scaling is not None and self.rope_scaling.rope_type != "default":
            scaling = {"rope_type": self.rope_scaling.rope_type, "factor": self.rope_scaling.factor}
            if self.rope_scaling.rope_type == "llama3":
                scaling |= {
                    "low_freq_factor": self.rope_scaling.low_freq_factor,
                    "high_freq_factor": self.rope_scaling.high_freq_factor,
                    "original_max_position_embeddings": self.rope_scaling.original_max_position_embeddings,
                }
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "attention_bias": False,
            "mlp_bias": False,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "pad_token_id": self.pad_token_id,
            "hidden_act": self.hidden_act,
            "hidden_size": self.hidden_size,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_position_embeddings,
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": self.num_hidden_layers,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_scaling": scaling,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.tie_word_embeddings,
            "vocab_size": self.known_vocab_size(),
        }
