"""What a model family must offer to be trained, without torch. The other packages know models through this alone.

A new family is one spec, one module, and one line in `MODELS`.
"""

from __future__ import annotations

import math
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, TypeVar

from titanlite.errors import UsageError
from titanlite.recipe.sections import Model, RopeScaling
from titanlite.registry import Registry, did_you_mean

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Style = Literal["vocab", "gather", "column", "row", "loss", "split", "attention", "experts"]
"""What becomes of a module when several ranks share it; all others are the same on each of them.

Over tp, activations between matrices are parts of the sequence:
- `vocab`: a `layers.Embedding` whose rows are cut; looked-up rows are summed, and each rank keeps its part of them
- `gather`: an `nn.Identity` that a module passes its input through, a part of the sequence: it is joined to all of it,
  for the module's `column` matrices alone
- `column`: a matrix whose rows (output features) are cut; its output stays cut
- `row`: a `layers.Linear` whose columns (input features) are cut; outputs are summed, and each rank keeps its part
- `loss`: takes hidden states, a matrix with rows for a part of the vocabulary, and labels: a `models.loss.TokenLoss`
- `split`: a module without a state whose output [batch, seq, …] is the same on all ranks; each keeps its part
Over cp, each rank has part of the sequence throughout:
- `attention`: an `layers.CausalAttention`; sees all ranks' keys and values
Over ep, whose ranks are tp's and others of the same model copy:
- `experts`: all its own parameters begin with the dimension of experts, which is cut; called with tokens [batch, seq,
  dim] and each expert's share of them [batch, seq, experts], it gives the sum of shares x what the experts make of
  these. It is given all ranks' tokens, and its ranks' sums are added.
"""


@dataclass(frozen=True)
class ShardingRule:
    """One line of a model's sharding plan."""

    pattern: str
    """Names of submodules, such as `layers.*.ffn.up`."""
    style: Style
    unit: int = 1
    """Rows (or columns) that stay together: those of a head, say."""


@dataclass(frozen=True)
class Piece:
    """Submodules that no pipeline cuts apart, and what they cost."""

    modules: tuple[str, ...]
    flops: int
    """Operations of a training step per token."""


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of one model; the meaning of each is in the recipe's `[model]`. Families may add their own."""

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
    window: tuple[int, ...] = ()

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def windows(self) -> tuple[int, ...]:
        """Keys that a query of each layer sees, 0 for all: `window`, repeated."""
        pattern = self.window or (0,)
        return tuple(pattern[layer % len(pattern)] for layer in range(self.layers))


Config = TypeVar("Config", bound=ModelConfig)


class ModelOutput(NamedTuple):
    """What a forward may return instead of a tensor alone. Sums are over the tokens whose labels count, of those that
    the module is given: tokens add up the same however they are divided, means do not.
    """

    result: Tensor  # logits, hidden states, or the sum of the token losses
    losses: Mapping[str, Tensor]
    """By name, sums of what is added to the token losses, and like them divided by the step's count of tokens."""
    statistics: Mapping[str, Tensor]
    """By name, sums that are only looked at, by rows of metrics and by the module's `update_buffers`."""


@dataclass(frozen=True)
class ModelFamily(Generic[Config]):
    """What a model family offers."""

    family: str
    presets: Mapping[str, Config]
    """Preset name -> Config."""
    configure: Callable[[Model], Config]
    """The recipe's `[model]` -> Config: the preset with the recipe's own keys laid over it."""
    shapes: Callable[[Config], Mapping[str, tuple[int, ...]]]
    """Config -> the shape of every parameter by name, in the module's own order; tied ones once."""
    embedding_parameters: Callable[[Config], int]
    """Parameters that are only looked up, never multiplied (0 where the head shares them)."""
    flops_per_token: Callable[[Config, int], int]
    """(Config, sequence length) -> floating-point operations of a training step per token, forward and backward."""
    module: str
    """`package.module:Class`; called as Class(config, compute_dtype), it builds a plain nn.Module."""
    initial_std: Callable[[Config, str], float | None]
    """(Config, parameter name) -> standard deviation of its initial normal values; None: ones."""
    compile_units: tuple[str, ...]
    """Name patterns of the submodules that are compiled one by one."""
    shard_units: tuple[str, ...]
    """Name patterns of the submodules that are gathered and released one by one when weights are sharded."""
    recompute_units: tuple[str, ...]
    """Name patterns of the submodules that may be run a second time in the backward pass."""
    sharding: Callable[[Config], tuple[ShardingRule, ...]]
    """Config -> the sharding plan."""
    cut_limit: Callable[[Config], int]
    """Config -> the most ranks that can share a matrix (tp)."""
    pieces: Callable[[Config, int], tuple[Piece, ...]]
    """(Config, sequence length) -> what a pipeline cuts between, in the order of computation."""
    tied: Callable[[Config], Mapping[str, str]]
    """Config -> parameters that are another one: {its name: the other's, which it is known by}."""
    is_block_matrix: Callable[[str], bool]
    """Whether a parameter is one of the blocks' matrices, by its name."""
    to_huggingface: Callable[[str], str]
    """Our parameter's name -> its name in the Hugging Face checkpoint of the same architecture (same layout)."""
    huggingface_classes: tuple[str, ...]
    """Classes of Hugging Face's transformers that compute what this family does, with the right config."""
    to_huggingface_config: Callable[[Config], Mapping[str, Any]]
    """Config -> what `config.json` says of the architecture; the context length is the caller's to add."""
    from_huggingface_config: Callable[[Mapping[str, Any]], Model]
    """A `config.json` of one of these classes -> the recipe's `[model]`. Raises `UsageError` naming a key that asks for
    what this family does not compute."""
    huggingface_derived: tuple[str, ...]
    """Name patterns of tensors in Hugging Face files that follow from the config, and are not read."""
    reports: Callable[[Config], Mapping[str, tuple[int, ...]]] = lambda config: {}
    """Config -> names and shapes of the auxiliary losses and statistics that a training forward returns."""

    def parameter_count(self, config: Config) -> int:
        """All parameters, tied ones once."""
        return sum(map(math.prod, self.shapes(config).values()))

    def build(self, config: Config, compute_dtype: torch.dtype) -> nn.Module:
        """The model as an nn.Module on the current default device (use `torch.device("meta")` to build none)."""
        built: nn.Module = pkgutil.resolve_name(self.module)(config, compute_dtype)
        return built


def saved_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that are part of the model's state, by name: persistent ones, zero before the first step."""
    return {
        f"{name}.{key}" if name else key: buffer
        for name, each in module.named_modules()
        for key, buffer in each.named_buffers(recurse=False)
        if key not in each._non_persistent_buffers_set
    }


ModelSpec = ModelFamily[ModelConfig]  # a family as packages see it that know none by name


def is_named_by(patterns: tuple[str, ...], name: str) -> bool:
    """Whether a submodule's name fits one of a spec's patterns: `layers.*` is `layers.3`, not `layers.3.ffn`."""
    return any(fnmatchcase(name, pattern) and name.count(".") == pattern.count(".") for pattern in patterns)


MODELS = Registry("model family", {"llama": "titanlite.models.llama_spec:SPEC"})


def spec_of(preset: str) -> ModelSpec:
    """The family that a preset belongs to. Raises `UsageError` with the nearest known preset."""
    specs: list[ModelSpec] = [MODELS.get(family) for family in MODELS]
    for spec in specs:
        if preset in spec.presets:
            return spec
    known = [name for spec in specs for name in spec.presets]
    raise UsageError(f"unknown preset '{preset}'; {did_you_mean(preset, known) or 'known: ' + ', '.join(known)}")
