"""What 'as exact as eager' means: against float64, an error no larger than that of the reference in the same dtype."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

Operation = Callable[..., Tensor | tuple[Tensor, ...]]


def results(operation: Operation, arguments: Sequence[object], gradients: Sequence[Tensor]) -> list[Tensor]:
    """What `operation` returns, and the gradients of those arguments that require one, given its results' own."""
    returned = operation(*arguments)
    outputs = returned if isinstance(returned, tuple) else (returned,)
    wanted = [argument for argument in arguments if isinstance(argument, Tensor) and argument.requires_grad]
    given = [gradient.to(output.dtype) for gradient, output in zip(gradients, outputs, strict=True)]
    return [*outputs, *torch.autograd.grad(outputs, wanted, given)]


def widened(arguments: Sequence[object]) -> list[object]:
    """The same numbers in float64, leaves that require gradients where the originals do."""
    return [
        argument.detach().double().requires_grad_(argument.requires_grad) if isinstance(argument, Tensor) else argument
        for argument in arguments
    ]


def all_three(
    operation: Operation,
    reference: Operation,
    arguments: Sequence[object],
    exact: Operation | None = None,
    gradient: float | None = None,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Each result and gradient of `operation`, of `reference` in the same dtype, and of `exact` in float64, which is
    the reference too unless what is asked for has a rounding in its midst. Gradients are of `gradient` times the
    result, else of random multiples.
    """
    returned = reference(*arguments)
    outputs = returned if isinstance(returned, tuple) else (returned,)
    gradients = [
        torch.randn_like(output) if gradient is None else torch.full_like(output, gradient) for output in outputs
    ]
    ours = results(operation, arguments, gradients)
    eager = results(reference, arguments, gradients)
    true = results(exact or reference, widened(arguments), gradients)
    assert all(our.shape == other.shape and our.dtype == other.dtype for our, other in zip(ours, eager, strict=True))
    return list(zip(ours, eager, true, strict=True))


def assert_as_exact_as_eager(
    operation: Operation, reference: Operation, arguments: Sequence[object], exact: Operation | None = None
) -> None:
    """No element of a result or a gradient is further from the exact one than eager's.

    That holds for what is computed in a wider type and rounded once, where no nearer number of the type is to be had.
    Half way between two of them either is near: so by a 256th of the unit in the last place of the largest value (in
    the dtype of the first argument) an element may miss.
    """
    assert isinstance(arguments[0], Tensor)
    unit = torch.finfo(arguments[0].dtype).eps
    for index, (our, other, true) in enumerate(all_three(operation, reference, arguments, exact)):
        further = ((our - true).abs() - (other - true).abs()).max() / true.abs().max().clamp(min=1e-300)
        assert further <= unit / 256, f"result {index}: {further / unit:.3g} units further than eager, in {our.dtype}"


class Errors:
    """Errors of results that are sums, where an element's is luck: their norms, pooled over cases, each element of
    each case counted by its share of the root mean square of the exact ones.
    """

    def __init__(self) -> None:
        self._squares: dict[str, tuple[float, float, float]] = {}

    def add(
        self, operation: Operation, reference: Operation, arguments: Sequence[object], gradient: float | None = None
    ) -> None:
        """One more case."""
        three = all_three(operation, reference, arguments, gradient=gradient)
        for index, (our, other, true) in enumerate(three):
            name = f"result {index}, {our.dtype}"
            ours, eagers, units = self._squares.get(name, (0.0, 0.0, 0.0))
            scale = true.square().mean()
            ours += ((our - true).square().sum() / scale).item()
            eagers += ((other - true).square().sum() / scale).item()
            self._squares[name] = ours, eagers, units + (torch.finfo(our.dtype).eps / 2 * (our.dim() == 0)) ** 2

    def assert_no_worse_than_eager(self) -> None:
        """Three hundredths pass: by so much do norms of some thousand independent roundings of one kind differ, and so
        much is in float32 one rounding more, of gradients that were formed before what they are scaled by is known. Of
        a scalar, which is one rounding a case and not thousands, half a unit in the last place passes too.
        """
        assert self._squares
        for name, squares in self._squares.items():
            ours, eagers, units = map(math.sqrt, squares)
            assert ours <= 1.03 * eagers + units, f"{name}: {ours:.3g}, eager's {eagers:.3g}"
