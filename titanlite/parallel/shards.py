"""Which rows of each parameter this rank holds, and how whole tensors are cut into and joined from them.

FSDP2 cuts every parameter by whole leading rows over `dp_shard`: ceil(rows / ranks) each, the last ranks fewer or
none. Optimizers, clipping and initialisation see plain tensors of those rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titanlite.parallel.layout import ceil_div


@dataclass(frozen=True)
class Shard:
    """This rank's rows of one parameter."""

    rows: Tensor
    """Rows `first` … of the parameter: a view, so that writing into it sets the parameter."""
    first: int
    shape: tuple[int, ...]
    """Shape of the whole parameter."""


class Shards:
    """All parameters of a model on this rank; `group` holds the ranks that share each, None if nothing is cut."""

    def __init__(self, model: nn.Module, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.ranks = group.size() if group is not None else 1
        self.rank = group.rank() if group is not None else 0
        self._parameters = dict(model.named_parameters())
        self.table = {name: self._shard(parameter) for name, parameter in self._parameters.items()}

    def _shard(self, parameter: nn.Parameter) -> Shard:
        shape = tuple(parameter.shape)
        if self.group is None:
            return Shard(parameter, 0, shape)
        first = min(self.rank * ceil_div(shape[0], self.ranks), shape[0])
        return Shard(parameter.to_local().detach(), first, shape)  # type: ignore[attr-defined]

    def local(self) -> dict[str, Tensor]:
        """Parameter name -> its rows on this rank; after `take_gradients` each carries its gradient in `.grad`."""
        return {name: shard.rows for name, shard in self.table.items()}

    def take_gradients(self) -> None:
        """Hand the gradients that the backward pass left on the sharded parameters to the tensors of `local`."""
        if self.group is not None:
            for name, parameter in self._parameters.items():
                self.table[name].rows.grad = parameter.grad.to_local()  # type: ignore[union-attr]

    def drop_gradients(self) -> None:
        """Free all gradients."""
        for name, parameter in self._parameters.items():
            parameter.grad = None
            self.table[name].rows.grad = None

    def windows(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor | Shard]:
        """Which part of which whole tensor each of `rows` is.

        The name of a tensor that is cut is a parameter's, or has it before its last slash, as optimizer state does
        (`norm.weight/average`); tensors of any other name are the same on every rank.
        """
        found = {name: (tensor, self._like(name)) for name, tensor in rows.items()}
        return {
            name: tensor if shard is None else Shard(tensor, shard.first, shard.shape)
            for name, (tensor, shard) in found.items()
        }

    def whole(self, rows: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
        """Join tensors from all ranks of the group, one after the other; every rank must call this.

        Where `keep`, they are returned, on the host if they were cut; else nothing is.
        """
        kept = {}
        for name, tensor in rows.items():
            joined = self._joined(name, tensor)
            if keep:
                kept[name] = joined if self.group is None else joined.cpu()
        return kept

    def exchange(self) -> MatrixExchange | None:
        """How cut matrices come together whole; None if nothing is cut."""
        return MatrixExchange(self.group) if self.group is not None else None

    def _like(self, name: str) -> Shard | None:
        return self.table.get(name) or self.table.get(name.rpartition("/")[0])

    def _joined(self, name: str, tensor: Tensor) -> Tensor:
        shard = self._like(name)
        if self.group is None or shard is None:
            return tensor
        rows = ceil_div(shard.shape[0], self.ranks)
        padded = tensor.new_zeros(rows, *tensor.shape[1:])
        padded[: tensor.shape[0]] = tensor.detach()
        joined = tensor.new_empty(self.ranks, *padded.shape)
        dist.all_gather(list(joined), padded, group=self.group)
        return joined.flatten(0, 1)[: shard.shape[0]]


class MatrixExchange:
    """Row-cut matrices of one shape to whole ones and back, each whole on one rank, the matrices shared out evenly.

    Two all-to-alls a step move what an all-gather would move once, and no rank repeats another's work.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._ranks = group.size()

    def collect(self, rows: Tensor, whole_rows: int) -> Tensor:
        """[n, rows here, columns] of n matrices -> [ceil(n / ranks), whole_rows, columns]: this rank's share."""
        count, here, columns = rows.shape
        share, per_rank = ceil_div(count, self._ranks), ceil_div(whole_rows, self._ranks)
        sent = rows.new_zeros(self._ranks * share, per_rank, columns)
        sent[:count, :here] = rows
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self._group)
        # Rank after rank: its rows of my matrices.
        pieces = received.view(self._ranks, share, per_rank, columns)
        return pieces.transpose(0, 1).reshape(share, self._ranks * per_rank, columns)[:, :whole_rows]

    def give_back(self, whole: Tensor, count: int, here: int) -> Tensor:
        """The inverse of `collect`: -> [count, rows here, columns]."""
        share, whole_rows, columns = whole.shape
        per_rank = ceil_div(whole_rows, self._ranks)
        padded = whole.new_zeros(share, self._ranks * per_rank, columns)
        padded[:, :whole_rows] = whole
        sent = padded.view(share, self._ranks, per_rank, columns).transpose(0, 1).contiguous()
        received = torch.empty_like(sent)
        dist.all_to_all_single(received.view(-1, columns), sent.view(-1, columns), group=self._group)
        return received.view(self._ranks * share, per_rank, columns)[:count, :here]
