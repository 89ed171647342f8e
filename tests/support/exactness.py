"""How exact operations are, against float64: bounds are the format's own, and no processor's kernels set them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

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


class Ideally(TorchDispatchMode):
    """Eager mode on no processor in particular: each operation's result is the exact one, rounded to its dtype once."""

    def __torch_dispatch__(self, operation: Any, types: Any, given: Any = (), named: Any = None) -> Any:
        result = operation(*given, **(named or {}))
        if operation.is_view or operation._schema.is_mutable or operation is torch.ops.aten._to_copy.default:
            return result
        exact = operation(*tree_map(_wide, given), **tree_map(_wide, named or {}))
        return tree_map(lambda to, x: x.to(to.dtype) if isinstance(x, Tensor) else x, result, exact)


def _wide(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def given_to(operation: Operation, arguments: Sequence[object], value: float | None = None) -> list[Tensor]:
    """Gradients of what `operation` returns: of that value, else of random ones."""
    returned = operation(*arguments)
    outputs = returned if isinstance(returned, tuple) else (returned,)
    return [torch.randn_like(output) if value is None else torch.full_like(output, value) for output in outputs]


def assert_nearest(
    operation: Operation, reference: Operation, arguments: Sequence[object], exact: Operation | None = None
) -> None:
    """Each element of each result and gradient is the number of its dtype that is nearest to the exact one: that of
    `exact` in float64, which is the reference too unless what is asked for has a rounding in its midst.

    Half way between two of them either is near: so by a 256th of the unit in the last place of the largest value (in
    the dtype of the first argument) an element may miss.
    """
    assert isinstance(arguments[0], Tensor)
    unit = torch.finfo(arguments[0].dtype).eps
    gradients = given_to(reference, arguments)
    ours = results(operation, arguments, gradients)
    like = results(reference, arguments, gradients)
    truths = results(exact or reference, widened(arguments), gradients)
    for index, (our, other, true) in enumerate(zip(ours, like, truths, strict=True)):
        assert our.shape == other.shape and our.dtype == other.dtype
        nearest = (true.to(our.dtype) - true).abs()
        further = ((our - true).abs() - nearest).max() / true.abs().max().clamp(min=1e-300)
        assert further <= unit / 256, f"result {index}: {further / unit:.3g} units off the nearest, in {our.dtype}"


class Errors:
    """Errors of results that are sums, where an element's is luck: their norms, pooled over cases, each element of
    each case counted by its share of the root mean square of the exact ones.
    """

    def __init__(self) -> None:
        self._squares: dict[str, tuple[float, float, float]] = {}

    def add(
        self,
        operation: Operation,
        reference: Operation,
        arguments: Sequence[object],
        gradient: float | None = None,
        once: bool = False,
    ) -> None:
        """One more case. Gradients are of `gradient` times the result, else of a random multiple. `once`: ideally only
        results are rounded, and nothing on the way to them.
        """
        gradients = given_to(reference, arguments, gradient)
        ours = results(operation, arguments, gradients)
        with Ideally():
            ideal = results(reference, arguments, gradients)
        truths = results(reference, widened(arguments), gradients)
        for index, (our, other, true) in enumerate(zip(ours, ideal, truths, strict=True)):
            assert our.shape == other.shape and our.dtype == other.dtype
            other = true.to(other.dtype) if once else other
            name = f"result {index}, {our.dtype}"
            scale = true.square().mean()
            new = (*(((x - true).square().sum() / scale).item() for x in (our, other)), true.numel())
            self._squares[name] = tuple(map(sum, zip(self._squares.get(name, (0, 0, 0)), new, strict=True)))

    def assert_ideal_but_for_sums(self, summands: int) -> None:
        """No larger than those of a reference whose every operation is exact and rounded once, but for sums of so many
        numbers in float32, each of which is a rounding more, and these add up as squares do.

        Three hundredths pass: by so much do norms of some thousand independent roundings of one kind differ. Of a
        scalar, which is one rounding a case and not thousands, half a unit in the last place passes too.
        """
        assert self._squares
        for name, squares in self._squares.items():
            ours, ideal, elements = map(math.sqrt, squares)
            allowed = 1.03 * ideal + elements * math.sqrt(summands) * 2**-24
            assert ours <= allowed, f"{name}: {ours:.3g}, of {ideal:.3g} ideally and {allowed:.3g} allowed"
