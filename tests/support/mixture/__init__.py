"""A model family of the tests: Llama whose feed-forwards are soft mixtures of experts, kept even by a saved bias.

Its experts live on another mesh than the other weights, its forward returns an auxiliary loss and a statistic, and its
buffers are trained: what a family may have that the shipped ones have not. Importing it registers it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import partial

from titanlite.models.llama_spec import PRESETS, SPEC, LlamaConfig, model_config
from titanlite.models.spec import MODELS, ShardingRule


@dataclass(frozen=True)
class MixtureConfig(LlamaConfig):
    experts: int = 4


CONFIG = MixtureConfig(**{key.name: getattr(PRESETS["debug"], key.name) for key in fields(LlamaConfig)})
BY_LAYER = "layers.{}.experts.{}"


def shapes(config: MixtureConfig) -> Mapping[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in SPEC.shapes(config).items():
        block, _, rest = name.rpartition("ffn.")
        if not block or rest == "gate.weight":
            found |= {} if block else {name: shape}
        elif rest == "up.weight":
            found[f"{block}router.weight"] = config.experts, config.dim
            found[f"{block}experts.up"] = config.experts, config.ffn_dim, config.dim
        else:
            found[f"{block}experts.down"] = config.experts, config.dim, config.ffn_dim
    return found


def sharding(config: MixtureConfig) -> tuple[ShardingRule, ...]:
    kept = (rule for rule in SPEC.sharding(config) if ".ffn" not in rule.pattern)
    return (*kept, ShardingRule("layers.*.experts", "experts"), ShardingRule("counted", "split"))


def reports(config: MixtureConfig) -> Mapping[str, tuple[int, ...]]:
    layers = range(config.layers)
    return {"router_z": ()} | {f"load.{layer}": (config.experts,) for layer in layers}


FAMILY = replace(
    SPEC,
    family="mixture",
    presets={"mixture": CONFIG},
    configure=partial(model_config, presets={"mixture": CONFIG}),
    shapes=shapes,
    sharding=sharding,
    reports=reports,
    module="support.mixture.model:Mixture",
    is_block_matrix=lambda name: SPEC.is_block_matrix(name) and "expert" not in name and "router" not in name,
    huggingface_classes=(),
)
MODELS.add("mixture", "support.mixture:FAMILY")
