"""A block of a Llama model, as titanlite, TorchTitan and torchao give it to the compiler."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._functional_collectives import all_gather_tensor_autograd, reduce_scatter_tensor_autograd
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from titanlite.models.layers import Rotation
from titanlite.models.llama_spec import PRESETS, LlamaConfig
from titanlite.models.spec import spec_of
from titanlite.parallel.tensor import apply_tensor_parallel
from titanlite.parallel.units import recompute_units
from titanlite.plan.float8 import SETTINGS, decide_linears, plan_gathers
from titanlite.plan.layout import require_layout
from titanlite.plan.placement import place
from titanlite.precision.float8 import convert
from titanlite.recipe.sections import Recipe

TOKENS = 8192
BLOCKS = {"1b": "llama3.2-1b", "8b": "llama3-8b", "70b": "llama3-70b"}
TORCHAO = {  # a recipe's name -> torchao's name for it
    "tensorwise": "tensorwise", "rowwise": "rowwise", "rowwise_with_hp_grad_weight": "rowwise_with_gw_hp",
}  # fmt: skip


@dataclass(frozen=True)
class Mode:
    """What a row of the table is about."""

    block: str
    code: str
    precision: str
    recompute: str
    tp: int

    @property
    def config(self) -> LlamaConfig:
        return PRESETS[BLOCKS[self.block]]

    def recipe(self) -> Recipe:
        """titanlite's, of one block."""
        float8 = {"float8": {"enabled": True, "recipe": self.precision}}
        return Recipe.model_validate(
            {
                "model": {"preset": BLOCKS[self.block], "layers": 1},
                "precision": {} if self.precision == "bf16" else float8,
                "recompute": {"mode": self.recompute},
                "parallel": {"tp": self.tp},
            }
        )


def modes() -> list[Mode]:
    """All rows. Float8's recipes with recomputation or `tp` are counted for the 8B block alone, to save time; mxfp8 for
    none: an H100 has no products of such blocks.
    """
    has_torchao = find_spec("torchao") is not None
    found = []
    for block, recompute, tp in product(BLOCKS, ("none", "selective", "full"), (1, 8)):
        recipes = tuple(TORCHAO) if block == "8b" or (recompute, tp) == ("none", 1) else ()
        found += [Mode(block, "titanlite", precision, recompute, tp) for precision in ("bf16", *recipes)]
        found.append(Mode(block, "torchtitan", "bf16", recompute, tp))
        if has_torchao and tp == 1:
            found += [Mode(block, "torchao", precision, recompute, tp) for precision in recipes]
    return found


def build(mode: Mode, fakes: FakeTensorMode) -> tuple[nn.Module, list[Any]]:
    """The block, its weights as FSDP gathers them, in bfloat16; and what to call it with. All tensors are fake."""
    with torch.device("meta"):
        block = _titanlite(mode) if mode.code == "titanlite" else _torchtitan(mode)
    half = mode.config.head_dim // 2
    with fakes:
        block.to_empty(device="cpu")
        x = torch.empty(1, TOKENS // mode.tp, mode.config.dim, dtype=torch.bfloat16, requires_grad=True)
        if mode.code == "titanlite":
            return block, [x, Rotation(*(torch.empty(1, TOKENS, 1, 2 * half) for _ in range(2)))]
        return block, [x, torch.empty(TOKENS, half, dtype=torch.complex64)]


class OpaqueAttention(nn.Module):
    """Attention that the compiler can't look into, the same for all codes: the operator of FlashAttention-2."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        """q [batch, seq, heads, head_dim], k and v [batch, seq, kv_heads, head_dim] -> like q."""
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]
        return out.transpose(1, 2)


def _titanlite(mode: Mode) -> nn.Module:
    """By the steps of `parallel/apply.py`. Weights in float8 are cast at each use, as where FSDP gathers them."""
    recipe = mode.recipe()
    spec = spec_of(recipe.model.preset)
    config = spec.configure(recipe.model)
    model: Any = spec.build(config, torch.bfloat16).to(torch.bfloat16)
    if mode.tp > 1:
        placements = place(recipe, require_layout(recipe.parallel, mode.tp))
        casts = {each.module: each.cast for each in plan_gathers(spec, config, recipe.precision.float8) if each.cast}
        apply_tensor_parallel(model, spec.sharding(config), placements, 0, dist.group.WORLD, casts)
    model.layers["0"].attention.core = OpaqueAttention()
    if found := decide_linears(spec, config, recipe.precision.float8):
        convert(model, found, SETTINGS[mode.precision], cache=False)
    recompute_units(model, spec, recipe.recompute)
    block: nn.Module = model.layers["0"]
    return block


def _torchtitan(mode: Mode) -> nn.Module:
    block: nn.Module = TorchTitanBlock(mode.config, mode.tp).to(torch.bfloat16)
    if mode.code == "torchao":
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        block = convert_to_float8_training(block, config=Float8LinearConfig.from_recipe_name(TORCHAO[mode.precision]))
    return block if mode.recompute == "none" else CheckpointedBlock(block, mode.recompute)


class TorchTitanBlock(nn.Module):
    """TorchTitan 0.3.0's Llama 3 block: one product for queries, keys and values, rotation as complex numbers, and
    w2(silu(w1 x) * w3 x). With `tp`, what its DTensors send, by torch's functional collectives.
    """

    def __init__(self, config: LlamaConfig, tp: int) -> None:
        super().__init__()
        dim, hidden, self.head_dim, self.tp = config.dim, config.ffn_dim // tp, config.head_dim, tp
        self.kv_heads, self.groups = config.kv_heads // tp, config.heads // config.kv_heads
        heads = self.kv_heads * self.groups
        self.attention_norm, self.ffn_norm = (nn.RMSNorm(dim, config.norm_eps) for _ in range(2))
        self.wqkv = nn.Linear(dim, (heads + 2 * self.kv_heads) * self.head_dim, bias=False)
        self.wo = nn.Linear(heads * self.head_dim, dim, bias=False)
        self.w1, self.w3 = (nn.Linear(dim, hidden, bias=False) for _ in range(2))
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.attention = OpaqueAttention()

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        """x [batch, seq / tp, dim], turns [seq, head_dim / 2] complex -> like x."""
        joined = self.wqkv(self._gather(self.attention_norm(x)))
        joined = joined.unflatten(-1, (self.kv_heads, self.groups + 2, self.head_dim))
        q, k, v = (each.flatten(2, 3).contiguous() for each in joined.split([self.groups, 1, 1], dim=-2))
        h = x + self._scatter(self.wo(self.attention(_turn(q, turns), _turn(k, turns), v).flatten(2)))
        normed = self._gather(self.ffn_norm(h))
        return h + self._scatter(self.w2(F.silu(self.w1(normed)) * self.w3(normed)))

    def _gather(self, x: Tensor) -> Tensor:
        return x if self.tp == 1 else all_gather_tensor_autograd(x, 1, dist.group.WORLD)

    def _scatter(self, x: Tensor) -> Tensor:
        return x if self.tp == 1 else reduce_scatter_tensor_autograd(x, "sum", 1, dist.group.WORLD)


def _turn(x: Tensor, turns: Tensor) -> Tensor:
    """Pairs of neighbours of x [batch, seq, heads, head_dim] as complex numbers, multiplied by [seq, head_dim / 2]."""
    turned = torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * turns.unsqueeze(1)
    return torch.view_as_real(turned).flatten(-2).type_as(x)


class CheckpointedBlock(nn.Module):
    """Recomputed; `selective`: but for attention, reduce-scattered results, largest values (float8's), products in
    float8, and every second of the others.
    """

    def __init__(self, block: nn.Module, recompute: str) -> None:
        super().__init__()
        self.block = block
        self.settings: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        if recompute == "selective":
            self.settings["context_fn"] = _every_second_product

    def forward(self, *arguments: Any) -> Any:
        return checkpoint(self.block, *arguments, **self.settings)


def _every_second_product() -> Any:
    aten, products = torch.ops.aten, {True: 0, False: 0}  # products so far, of the recomputation and before it
    kept = (
        aten.mm.default, aten._scaled_mm.default, aten.max.default, aten._scaled_dot_product_flash_attention.default,
        torch.ops._c10d_functional.reduce_scatter_tensor.default,
    )  # fmt: skip

    def policy(context: Any, operation: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
        is_product = operation is aten.mm.default
        products[context.is_recompute] += is_product
        if operation not in kept or (is_product and products[context.is_recompute] % 2 == 0):
            return CheckpointPolicy.PREFER_RECOMPUTE
        return CheckpointPolicy.MUST_SAVE

    return create_selective_checkpoint_contexts(policy)
