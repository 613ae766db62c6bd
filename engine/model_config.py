"""What a checkpoint says about its model: one frozen description of the supported decoder families."""

from __future__ import annotations

from dataclasses import dataclass

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
MAX_LAYERS = 1024


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding: `inv_freq[i] = theta ** (-2 i / head_dim)`, then scaled.

    `scaling` is one of
      none     as above;
      linear   frequencies divided by `factor`;
      llama3   long wavelengths divided by `factor`, short ones kept, a ramp between the two
               (`low_freq_factor`, `high_freq_factor`, `original_max_position`);
      factors  frequencies divided one by one by `frequency_factors` (head_dim / 2 of them), the
               form in which a GGUF file stores llama3 scaling.
    """

    theta: float = 10_000.0
    scaling: str = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 0
    frequency_factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.scaling not in ("none", "linear", "llama3", "factors"):
            raise ValueError(f"rope scaling {self.scaling!r} is not supported")
        if not self.theta > 0 or not self.factor > 0:
            raise ValueError("rope theta and factor must be positive")
        if self.scaling == "llama3" and not (
            self.original_max_position > 0 and 0 < self.low_freq_factor < self.high_freq_factor
        ):
            raise ValueError("llama3 rope scaling needs 0 < low_freq_factor < high_freq_factor and a length")
        if (self.scaling == "factors") != bool(self.frequency_factors):
            raise ValueError("rope frequency factors go with the scaling 'factors', and only with it")

    def describe(self) -> str:
        """One line that changes whenever a rotation would: part of the block hash's context."""
        fields = (
            self.theta,
            self.factor,
            self.low_freq_factor,
            self.high_freq_factor,
            self.original_max_position,
            *self.frequency_factors,
        )
        return f"{self.scaling}:" + ",".join(repr(field) for field in fields)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A pre-norm decoder with RMSNorm, rotary attention with grouped KV heads, and a SwiGLU MLP.

    `max_position` is the longest context served. Where the checkpoint uses a sliding window it is
    cut to the window: up to that length windowed and full attention are the same function.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position: int
    tie_word_embeddings: bool
    has_qkv_bias: bool = False
    has_qk_norm: bool = False

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"architecture {self.architecture!r} is not one of {', '.join(ARCHITECTURES)}")
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_position",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if self.num_layers > MAX_LAYERS:
            raise ValueError(f"{self.num_layers} layers are more than {MAX_LAYERS}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} heads are not a multiple of {self.num_kv_heads} KV heads")
        if self.head_dim % 2:
            raise ValueError(f"rotary embedding needs an even head_dim, not {self.head_dim}")
        if not self.rms_norm_eps > 0:
            raise ValueError("rms_norm_eps must be positive")
        factors = self.rope.frequency_factors
        if factors and len(factors) != self.head_dim // 2:
            raise ValueError(f"{len(factors)} rope frequency factors for head_dim {self.head_dim}")

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every weight the model needs, by its transformers name; linear weights are (out, in)."""
        hidden, inner = self.hidden_size, self.intermediate_size
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, hidden),
            "model.norm.weight": (hidden,),
        }
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        layer: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (self.q_size, hidden),
            "self_attn.k_proj.weight": (self.kv_size, hidden),
            "self_attn.v_proj.weight": (self.kv_size, hidden),
            "self_attn.o_proj.weight": (hidden, self.q_size),
            "post_attention_layernorm.weight": (hidden,),
            "mlp.gate_proj.weight": (inner, hidden),
            "mlp.up_proj.weight": (inner, hidden),
            "mlp.down_proj.weight": (hidden, inner),
        }
        if self.has_qkv_bias:
            layer["self_attn.q_proj.bias"] = (self.q_size,)
            layer["self_attn.k_proj.bias"] = (self.kv_size,)
            layer["self_attn.v_proj.bias"] = (self.kv_size,)
        if self.has_qk_norm:
            layer["self_attn.q_norm.weight"] = (self.head_dim,)
            layer["self_attn.k_norm.weight"] = (self.head_dim,)
        for index in range(self.num_layers):
            shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
        return shapes
