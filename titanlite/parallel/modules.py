"""How parallelism changes a model: modules in the place of others, under the names that parameters have without it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch.distributed as dist
from torch import nn

from titanlite.models.spec import ShardingRule, is_named_by


def modules_by_rule(model: nn.Module, plan: Sequence[ShardingRule]) -> Iterator[tuple[ShardingRule, str, nn.Module]]:
    """Each rule of the plan with each submodule that it names, in the plan's order."""
    modules = list(model.named_modules())
    for rule in plan:
        yield from ((rule, name, module) for name, module in modules if is_named_by((rule.pattern,), name))


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the submodule of this name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


class Wrapper(nn.Module):
    """Takes the place of a module. To its outside it has the parameters, buffers and submodules of that module, under
    the same names, and what else it does not have itself, such as `update_buffers`.
    """

    whole: nn.Module

    def __init__(self, whole: nn.Module) -> None:
        super().__init__()
        shared = "_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"
        # Not as attributes are set: `whole` as a submodule would be part of its submodules' names.
        vars(self).update({key: vars(whole)[key] for key in shared}, whole=whole)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "whole" not in vars(self):
                raise  # a copy that is not filled yet
            return getattr(self.whole, name)


class GroupModule(nn.Module):
    """A module whose work is divided among the ranks of a group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group = group

    def extra_repr(self) -> str:
        return f"ranks={self.group.size()}"
