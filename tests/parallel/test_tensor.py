"""What takes the place of a module under tensor parallelism; whole runs are in test_lattice.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from support.recipes import recipe
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from titanlite.models.layers import Embedding, Linear
from titanlite.models.llama_spec import PRESETS, SPEC
from titanlite.models.spec import ShardingRule
from titanlite.parallel.tensor import apply_tensor_parallel
from titanlite.plan.layout import Layout
from titanlite.plan.placement import place

RANKS, RANK = 4, 2


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=RANKS)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


class Counted(nn.Module):
    """Which tokens count: the same on all ranks, where what it is used with is a part of the sequence."""

    def forward(self, labels: Tensor, *, but: int) -> Tensor:
        return labels != but


def test_each_rank_keeps_its_part_of_what_is_split(group: dist.ProcessGroup) -> None:
    model, labels = nn.ModuleDict({"counted": Counted()}), torch.randint(0, 3, (2, 4 * RANKS))
    apply_tensor_parallel(model, (ShardingRule("counted", "split"),), {}, RANK, group, {})
    kept = model["counted"](labels, but=0)
    assert kept.equal((labels != 0)[:, 4 * RANK : 4 * RANK + 4])
    assert "(counted): SplitSequence(\n    ranks=4\n    (whole): Counted()" in str(model)


@pytest.mark.parametrize(
    ("style", "module"),
    [
        ("gather", Linear(8, 8)),
        ("row", nn.Linear(8, 8, bias=False)),
        ("row", type("Scaled", (Linear,), {})(8, 8)),
        ("vocab", type("Scaled", (Embedding,), {})(8, 8, torch.float32)),
        ("split", Linear(8, 8)),
        ("split", nn.BatchNorm1d(8, affine=False)),
    ],
    ids=str,
)
def test_a_rule_for_what_it_cannot_replace_is_refused(group: dist.ProcessGroup, style: str, module: nn.Module) -> None:
    """What a replacement does not compute would be lost without a word."""
    with pytest.raises(TypeError, match=f"the sharding plan has '{style}' for .*{type(module).__name__}"):
        apply_tensor_parallel(nn.ModuleDict({"one": module}), (ShardingRule("one", style),), {}, RANK, group, {})  # type: ignore[arg-type]


def test_a_model_shows_what_its_ranks_do_and_keeps_its_names(group: dist.ProcessGroup) -> None:
    config = PRESETS["125m"]
    with torch.device("meta"):
        model = SPEC.build(config, torch.float32)
    names, modules = list(model.state_dict()), [name for name, _ in model.named_modules()]
    placements = place(recipe(model__preset="125m"), Layout(1, 1, tp=RANKS))
    placements |= {"head.weight": placements["embed.weight"]}
    apply_tensor_parallel(model, SPEC.sharding(config), placements, RANK, group, {})
    assert list(model.state_dict()) == names and [name for name, _ in model.named_modules()] == modules
    assert all(each.is_meta for each in model.parameters())
    shown = str(model)
    for line in (
        "(embed): VocabularyEmbedding(8000, 768)",
        "(input): GatherSequence(ranks=4)",
        "(wq): Linear(in_features=768, out_features=192, bias=False)",
        "(wo): RowLinear(in_features=192, out_features=768, bias=False)",
        "(down): RowLinear(in_features=640, out_features=768, bias=False)",
        "(loss): VocabularyLoss()",
    ):
        assert line in shown
