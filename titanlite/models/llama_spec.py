"""The Llama family in numbers: sizes, presets, parameter and operation counts. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from titanlite.models.spec import ModelSpec, Piece, ShardingRule, spec_of
from titanlite.recipe.sections import Model, RopeScaling


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of one model; the meaning of each is in the recipe's `[model]`."""

    dim: int
    layers: int
    heads: int
    kv_heads: int
    ffn_dim: int
    vocab_size: int
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    qk_norm: bool = False
    init_std: float = 0.02
    depth_scaled_init: bool = True

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


_LLAMA3_VOCAB = 128_256
_SMALL_VOCAB = 32_000

PRESETS: dict[str, LlamaConfig] = {
    # 272 rows: the byte tokenizer's 257, padded to a multiple of 16 for the matrix units.
    "debug": LlamaConfig(128, 4, 4, 2, 384, 272, rope_theta=10_000.0, qk_norm=True),
    "30m": LlamaConfig(384, 10, 6, 6, 1024, _SMALL_VOCAB, rope_theta=10_000.0, tie_embeddings=True),
    "125m": LlamaConfig(768, 12, 12, 12, 2560, _SMALL_VOCAB, rope_theta=10_000.0, tie_embeddings=True),
    "350m": LlamaConfig(1024, 24, 16, 16, 2816, _SMALL_VOCAB, rope_theta=10_000.0, tie_embeddings=True),
    "llama3.2-1b": LlamaConfig(
        2048, 16, 32, 8, 8192, _LLAMA3_VOCAB, rope_scaling=RopeScaling(factor=32.0), tie_embeddings=True
    ),
    "llama3.2-3b": LlamaConfig(
        3072, 28, 24, 8, 8192, _LLAMA3_VOCAB, rope_scaling=RopeScaling(factor=32.0), tie_embeddings=True
    ),
    "llama3-8b": LlamaConfig(4096, 32, 32, 8, 14336, _LLAMA3_VOCAB),
    "llama3-70b": LlamaConfig(8192, 80, 64, 8, 28672, _LLAMA3_VOCAB),
    "llama3.1-405b": LlamaConfig(16384, 126, 128, 8, 53248, _LLAMA3_VOCAB, rope_scaling=RopeScaling(factor=8.0)),
}

_SIZES = ("dim", "layers", "heads", "kv_heads", "ffn_dim", "vocab_size", "rope_theta", "rope_scaling", "norm_eps")
_SWITCHES = ("tie_embeddings", "qk_norm")


def model_config(section: Model) -> LlamaConfig:
    """The preset with the recipe's own keys laid over it. Raises `UsageError` for an unknown preset."""
    preset: LlamaConfig = spec_of(section.preset).presets[section.preset]
    given = {name: getattr(section, name) for name in _SIZES + _SWITCHES if getattr(section, name) is not None}
    return replace(preset, **given, init_std=section.init_std, depth_scaled_init=section.depth_scaled_init)


def matrix_parameters(config: LlamaConfig) -> int:
    """Parameters in the blocks' seven matrices."""
    kv_dim = config.kv_heads * config.head_dim
    attention = 2 * config.dim * config.dim + 2 * config.dim * kv_dim
    return config.layers * (attention + 3 * config.dim * config.ffn_dim)


def parameter_count(config: LlamaConfig) -> int:
    """All parameters; tied embeddings count once."""
    norms = config.layers * (2 * config.dim + (2 * config.head_dim if config.qk_norm else 0)) + config.dim
    tables = config.vocab_size * config.dim * (1 if config.tie_embeddings else 2)
    return matrix_parameters(config) + norms + tables


def shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter; a matrix is [outputs, inputs]."""
    dim, kv_dim = config.dim, config.kv_heads * config.head_dim
    block: dict[str, tuple[int, ...]] = {"attention_norm.weight": (dim,)}
    block |= {"attention.wq.weight": (dim, dim), "attention.wk.weight": (kv_dim, dim)}
    block |= {"attention.wv.weight": (kv_dim, dim), "attention.wo.weight": (dim, dim)}
    if config.qk_norm:
        block |= {f"attention.{which}_norm.weight": (config.head_dim,) for which in ("q", "k")}
    block |= {"ffn_norm.weight": (dim,), "ffn.gate.weight": (config.ffn_dim, dim)}
    block |= {"ffn.up.weight": (config.ffn_dim, dim), "ffn.down.weight": (dim, config.ffn_dim)}
    table = (config.vocab_size, dim)
    blocks = {f"layers.{index}.{name}": shape for index in range(config.layers) for name, shape in block.items()}
    head = {} if config.tie_embeddings else {"head.weight": table}
    return {"embed.weight": table, **blocks, "norm.weight": (dim,), **head}


def embedding_parameters(config: LlamaConfig) -> int:
    """Parameters that are looked up and never multiplied: the embedding, unless the head shares it."""
    return 0 if config.tie_embeddings else config.vocab_size * config.dim


def flops_per_token(config: LlamaConfig, sequence_length: int) -> int:
    """Forward and backward operations per token: 6 (N - N_embedding) + 6 L heads 2 head_dim seq.

    Two operations a multiply-add, times one forward and two backward products. Attention counts QK^T and AV over the
    whole square, as the PaLM paper (appendix B) and most trainers do; recomputation does not count.
    """
    products = 6 * (parameter_count(config) - embedding_parameters(config))
    attention = 6 * config.layers * config.heads * 2 * config.head_dim * sequence_length
    return products + attention


def initial_std(config: LlamaConfig, name: str) -> float | None:
    """Norms start at one, matrices at `init_std`, those that write into the residual stream smaller by depth."""
    if "norm" in name:
        return None
    writes_residual = name.endswith(("attention.wo.weight", "ffn.down.weight"))
    if writes_residual and config.depth_scaled_init:
        return config.init_std / math.sqrt(2 * config.layers)
    return config.init_std


def is_block_matrix(name: str) -> bool:
    """Whether a parameter is one of the seven matrices of a block."""
    return name.startswith("layers.") and "norm" not in name


def sharding(config: LlamaConfig) -> tuple[ShardingRule, ...]:
    """Megatron's plan (Shoeybi et al. 2019; Korthikanti et al. 2022 for the sequence): heads and FFN are cut."""
    queries = config.heads // config.kv_heads * config.head_dim  # those of one key and value head stay with it
    return (
        ShardingRule("embed", "vocab"),
        ShardingRule("document_mask", "mask"),
        ShardingRule("layers.*.attention", "gather"),
        ShardingRule("layers.*.attention.wq", "column", queries),
        ShardingRule("layers.*.attention.wk", "column", config.head_dim),
        ShardingRule("layers.*.attention.wv", "column", config.head_dim),
        ShardingRule("layers.*.attention.core", "attention"),
        ShardingRule("layers.*.attention.wo", "row", queries),
        ShardingRule("layers.*.ffn", "gather"),
        ShardingRule("layers.*.ffn.gate", "column"),
        ShardingRule("layers.*.ffn.up", "column"),
        ShardingRule("layers.*.ffn.down", "row"),
        ShardingRule("head", "gather"),
        ShardingRule("head", "column"),
        ShardingRule("head.loss", "loss"),
    )


def cut_limit(config: LlamaConfig) -> int:
    """A key and value head is not cut."""
    return min(config.kv_heads, config.ffn_dim, config.vocab_size)


def pieces(config: LlamaConfig, sequence_length: int) -> tuple[Piece, ...]:
    """Embedding, blocks, and the final norm with the head."""
    head = 6 * config.vocab_size * config.dim
    everything = flops_per_token(config, sequence_length)
    # A tied head is counted among the operations once, as it is here.
    block = (everything - head) // config.layers
    blocks = [Piece((f"layers.{index}",), block) for index in range(config.layers)]
    # A look-up and the sum of its gradients: a few passes over one row.
    return (Piece(("embed",), 6 * config.dim), *blocks, Piece(("norm", "head"), head))


def tied(config: LlamaConfig) -> dict[str, str]:
    """The head may be the embedding."""
    return {"head.weight": "embed.weight"} if config.tie_embeddings else {}


_HUGGINGFACE = {
    "embed": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention": "self_attn",
    "ffn": "mlp",
    "wq": "q_proj",
    "wk": "k_proj",
    "wv": "v_proj",
    "wo": "o_proj",
    "gate": "gate_proj",
    "up": "up_proj",
    "down": "down_proj",
    "layers": "model.layers",
}


def to_huggingface(name: str) -> str:
    """`layers.3.attention.wq.weight` -> `model.layers.3.self_attn.q_proj.weight`; the tensors are laid out alike."""
    return ".".join(_HUGGINGFACE.get(part, part) for part in name.split("."))


SPEC = ModelSpec(
    family="llama",
    presets=PRESETS,
    configure=model_config,
    parameter_count=parameter_count,
    shapes=shapes,
    embedding_parameters=embedding_parameters,
    flops_per_token=flops_per_token,
    module="titanlite.models.llama:Llama",
    initial_std=initial_std,
    compile_units=("layers.*", "head"),
    shard_units=("embed", "layers.*", "head"),
    recompute_units=("layers.*",),
    sharding=sharding,
    hidden_size=lambda config: config.dim,
    cut_limit=cut_limit,
    pieces=pieces,
    tied=tied,
    is_block_matrix=is_block_matrix,
    to_huggingface=to_huggingface,
)
