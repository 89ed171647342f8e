"""The Llama family in numbers: sizes, presets, parameter and operation counts. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NoReturn

from pydantic import ValidationError

from titanlite.errors import UsageError
from titanlite.models.spec import ModelConfig, ModelFamily, Piece, ShardingRule
from titanlite.recipe.sections import Model, RopeScaling


@dataclass(frozen=True)
class LlamaConfig(ModelConfig):
    init_std: float = 0.02
    depth_scaled_init: bool = True


_LLAMA3_VOCAB = 128_256
_SMALL_VOCAB = 32_000
_BY_32 = RopeScaling(factor=32.0)
_CUSTOM = "custom"
PRESETS: dict[str, LlamaConfig] = {
    # Without a preset, only sizes need to be written. 272 rows: the byte tokenizer's 257, padded to a multiple of 16.
    _CUSTOM: LlamaConfig(128, 4, 4, 4, 384, 272),
    "debug": LlamaConfig(128, 4, 4, 2, 384, 272, rope_theta=10_000.0, qk_norm=True),
    "30m": LlamaConfig(384, 10, 6, 6, 1024, _SMALL_VOCAB, rope_theta=10_000.0, tie_embeddings=True),
    "125m": LlamaConfig(768, 12, 12, 12, 2560, _SMALL_VOCAB, rope_theta=10_000.0, tie_embeddings=True),
    "350m": LlamaConfig(1024, 24, 16, 16, 2816, _SMALL_VOCAB, rope_theta=10_000.0, tie_embeddings=True),
    "llama3.2-1b": LlamaConfig(2048, 16, 32, 8, 8192, _LLAMA3_VOCAB, rope_scaling=_BY_32, tie_embeddings=True),
    "llama3.2-3b": LlamaConfig(3072, 28, 24, 8, 8192, _LLAMA3_VOCAB, rope_scaling=_BY_32, tie_embeddings=True),
    "llama3-8b": LlamaConfig(4096, 32, 32, 8, 14336, _LLAMA3_VOCAB),
    "llama3-70b": LlamaConfig(8192, 80, 64, 8, 28672, _LLAMA3_VOCAB),
    "llama3.1-405b": LlamaConfig(16384, 126, 128, 8, 53248, _LLAMA3_VOCAB, rope_scaling=RopeScaling(factor=8.0)),
}


def model_config(section: Model, presets: Mapping[str, LlamaConfig] = PRESETS) -> LlamaConfig:
    """The preset, which is one of this family's, with the recipe's own keys laid over it."""
    preset = presets[section.preset]
    given = {key.name: value for key in fields(ModelConfig) if (value := getattr(section, key.name)) is not None}
    if section.window is not None:
        given["window"] = (section.window,) if isinstance(section.window, int) else section.window
    if section.preset == _CUSTOM:  # these two follow from the others
        dim, heads = given.get("dim", preset.dim), given.get("heads", preset.heads)
        given = {"kv_heads": heads, "ffn_dim": -(-8 * dim // (3 * 128)) * 128, **given}
    return replace(preset, **given, init_std=section.init_std, depth_scaled_init=section.depth_scaled_init)


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
    """The embedding, unless the head shares it."""
    return 0 if config.tie_embeddings else config.vocab_size * config.dim


def flops_per_token(config: LlamaConfig, sequence_length: int) -> int:
    """Forward and backward operations per token: 6 (N - N_embedding) + 6 heads 2 head_dim (sum of keys over layers).

    Two operations a multiply-add, times one forward and two backward products. Attention counts QK^T and AV over the
    whole square, or all of a window, as the PaLM paper (appendix B) and most trainers do; recomputation does not count.
    """
    multiplied = sum(map(math.prod, shapes(config).values())) - embedding_parameters(config)
    return 6 * multiplied + sum(_attention_flops(config, sequence_length))


def _attention_flops(config: LlamaConfig, sequence_length: int) -> list[int]:
    """Of each layer, per token."""
    keys = (min(window or sequence_length, sequence_length) for window in config.windows)
    return [6 * config.heads * 2 * config.head_dim * seen for seen in keys]


def initial_std(config: LlamaConfig, name: str) -> float | None:
    """Norms start at one, matrices at `init_std`, those that write into the residual stream smaller by depth."""
    if "norm" in name:
        return None
    if config.depth_scaled_init and name.endswith(("attention.wo.weight", "ffn.down.weight")):
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
        ShardingRule("layers.*.attention.input", "gather"),
        ShardingRule("layers.*.attention.wq", "column", queries),
        ShardingRule("layers.*.attention.wk", "column", config.head_dim),
        ShardingRule("layers.*.attention.wv", "column", config.head_dim),
        ShardingRule("layers.*.attention.core", "attention"),
        ShardingRule("layers.*.attention.wo", "row", queries),
        ShardingRule("layers.*.ffn.input", "gather"),
        ShardingRule("layers.*.ffn.gate", "column"),
        ShardingRule("layers.*.ffn.up", "column"),
        ShardingRule("layers.*.ffn.down", "row"),
        ShardingRule("head.input", "gather"),
        ShardingRule("head", "column"),
        ShardingRule("head.loss", "loss"),
    )


def cut_limit(config: LlamaConfig) -> int:
    """A key and value head is not cut."""
    return min(config.kv_heads, config.ffn_dim, config.vocab_size)


def pieces(config: LlamaConfig, sequence_length: int) -> tuple[Piece, ...]:
    """Embedding, blocks, and the final norm with the head."""
    head = 6 * config.vocab_size * config.dim  # a tied one is counted among the operations once, too
    attention = _attention_flops(config, sequence_length)
    block = (flops_per_token(config, sequence_length) - head - sum(attention)) // config.layers
    blocks = [Piece((f"layers.{index}",), block + own) for index, own in enumerate(attention)]
    # A look-up and the sum of its gradients: a few passes over one row.
    return (Piece(("embed",), 6 * config.dim), *blocks, Piece(("norm", "head"), head))


def tied(config: LlamaConfig) -> dict[str, str]:
    """The head may be the embedding."""
    return {"head.weight": "embed.weight"} if config.tie_embeddings else {}


_HUGGINGFACE = {
    "embed": "model.embed_tokens", "layers": "model.layers", "norm": "model.norm", "head": "lm_head",
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attention": "self_attn", "wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj",
    "ffn": "mlp", "gate": "gate_proj", "up": "up_proj", "down": "down_proj",
}  # fmt: skip


def to_huggingface(name: str) -> str:
    """`layers.3.attention.wq.weight` -> `model.layers.3.self_attn.q_proj.weight`; the tensors are laid out alike."""
    return ".".join(_HUGGINGFACE.get(part, part) for part in name.split("."))


_HUGGINGFACE_SIZES = {
    "vocab_size": "vocab_size", "dim": "hidden_size", "ffn_dim": "intermediate_size",
    "layers": "num_hidden_layers", "heads": "num_attention_heads", "kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps", "tie_embeddings": "tie_word_embeddings",
}  # fmt: skip
_HUGGINGFACE_SCALING = {
    "factor": "factor", "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor",
    "original_context": "original_max_position_embeddings",
}  # fmt: skip
# What a `config.json` may say of things that this family has one way of doing, or leave out.
_HUGGINGFACE_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,), "use_sliding_window": (False,),
    "quantization_config": (None,), "partial_rotary_factor": (1, None),
}  # fmt: skip


def to_huggingface_config(config: LlamaConfig) -> dict[str, Any]:
    """Fields of `LlamaForCausalLM`, or of `Qwen3ForCausalLM`, which is the same with normed queries and keys. Raises
    `UsageError` for a window: these have none.
    """
    if any(config.windows):
        raise UsageError(
            "model.window: LlamaForCausalLM and Qwen3ForCausalLM attend to all tokens, whatever its window."
        )
    qwen = config.qk_norm
    fields: dict[str, Any] = {
        "architectures": ["Qwen3ForCausalLM" if qwen else "LlamaForCausalLM"],
        "model_type": "qwen3" if qwen else "llama",
        **{theirs: getattr(config, ours) for ours, theirs in _HUGGINGFACE_SIZES.items()},
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        **({"use_sliding_window": False} if qwen else {"mlp_bias": False}),
        "rope_theta": config.rope_theta,  # as transformers 4 writes it; later ones read it too
        "rope_scaling": None,
    }
    if config.rope_scaling is not None:
        scaling = {theirs: getattr(config.rope_scaling, ours) for ours, theirs in _HUGGINGFACE_SCALING.items()}
        fields["rope_scaling"] = {"rope_type": "llama3", **scaling}
    return fields


def from_huggingface_config(fields: Mapping[str, Any]) -> Model:
    """The preset of these sizes if there is one, or all sizes, one by one. Raises `UsageError`."""
    for key, allowed in _HUGGINGFACE_ONLY.items():
        if key in fields and fields[key] not in allowed:
            _refuse(key, fields[key], f"only {allowed[0]!r} is known here")
    kinds = fields.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        _refuse("layer_types", kinds, "only a list of 'full_attention' is known here")
    rope = _huggingface_rope(fields)
    given = {ours: fields.get(theirs) for ours, theirs in _HUGGINGFACE_SIZES.items()}
    for ours, default in (("kv_heads", given["heads"]), ("norm_eps", 1e-6), ("tie_embeddings", False)):
        given[ours] = default if given[ours] is None else given[ours]
    if missing := [theirs for ours, theirs in _HUGGINGFACE_SIZES.items() if given[ours] is None]:
        raise UsageError(f"it does not give {missing[0]}")
    qwen = fields.get("model_type") == "qwen3"
    try:
        section = Model.model_validate({"preset": _CUSTOM, **given, **rope, "qk_norm": qwen})
    except ValidationError as error:
        item = error.errors(include_url=False, include_context=False)[0]
        ours = str(item["loc"][-1])
        _refuse((_HUGGINGFACE_SIZES | _HUGGINGFACE_SCALING).get(ours, ours), item["input"], item["msg"])
    config = model_config(section)
    if config.dim % config.heads or config.heads % config.kv_heads or config.head_dim % 2:
        problem = f"{config.dim} values, {config.heads} heads and {config.kv_heads} key and value heads do not divide"
        raise UsageError(f"num_attention_heads: {problem} into heads of an even size")
    head_dim = fields.get("head_dim")
    if head_dim is None:
        head_dim = 128 if qwen else config.head_dim  # transformers' defaults
    if head_dim != config.head_dim:
        _refuse("head_dim", head_dim, f"only hidden_size / num_attention_heads = {config.head_dim} is known here")
    named = (Model(preset=name) for name, preset in PRESETS.items() if preset == config and name != _CUSTOM)
    return next(named, section)


def _huggingface_rope(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The rotation, as transformers 4 writes it (two keys) or transformers 5 does (one)."""
    tables = {key: fields[key] for key in ("rope_parameters", "rope_scaling") if fields.get(key) is not None}
    for key, table in tables.items():
        if not isinstance(table, Mapping):
            _refuse(key, table, "it must be a table")
    scaling: Mapping[str, Any] = next(iter(tables.values()), {})
    if tables.get("rope_scaling", scaling) != scaling:
        _refuse("rope_scaling", tables["rope_scaling"], "rope_parameters says otherwise; keep the one that is right")
    if scaling.get("partial_rotary_factor", 1) not in (1, None):
        _refuse("partial_rotary_factor", scaling["partial_rotary_factor"], "only 1 is known here")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default" and (unused := scaling.keys() - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}):
        _refuse("rope_scaling", scaling, f"{min(map(str, unused))} has no effect without a rope_type such as 'llama3'")
    bases = [table["rope_theta"] for table in (scaling, fields) if table.get("rope_theta") is not None] or [10_000.0]
    if bases[0] != bases[-1]:
        _refuse("rope_theta", bases[1], f"its rotation has another, {str(bases[0])[:80]!r}; keep the one that is right")
    if kind == "default":
        return {"rope_theta": bases[0]}
    if kind != "llama3":
        _refuse("rope_type", kind, "only 'default' and 'llama3' are known here")
    if missing := [theirs for theirs in _HUGGINGFACE_SCALING.values() if theirs not in scaling]:
        raise UsageError(f"its rope_scaling does not give {missing[0]}")
    given = {ours: scaling[theirs] for ours, theirs in _HUGGINGFACE_SCALING.items()}
    if given["low_freq_factor"] == given["high_freq_factor"]:
        _refuse("high_freq_factor", given["high_freq_factor"], "it must differ from low_freq_factor")
    return {"rope_theta": bases[0], "rope_scaling": given}


def _refuse(key: str, value: object, problem: str) -> NoReturn:
    raise UsageError(f"its {key} is {str(value)[:80]!r}: {problem}")


SPEC = ModelFamily(
    family="llama",
    presets=PRESETS,
    configure=model_config,
    shapes=shapes,
    embedding_parameters=embedding_parameters,
    flops_per_token=flops_per_token,
    module="titanlite.models.llama:Llama",
    initial_std=initial_std,
    compile_units=("layers.*", "head"),
    shard_units=("embed", "layers.*", "head"),
    recompute_units=("layers.*",),
    sharding=sharding,
    cut_limit=cut_limit,
    pieces=pieces,
    tied=tied,
    is_block_matrix=is_block_matrix,
    to_huggingface=to_huggingface,
    huggingface_classes=("LlamaForCausalLM", "Qwen3ForCausalLM"),
    to_huggingface_config=to_huggingface_config,
    from_huggingface_config=from_huggingface_config,
    huggingface_derived=("model.layers.*.self_attn.rotary_emb.inv_freq",),
)
