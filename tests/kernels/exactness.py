"""What 'as exact as eager' means: against float64, an error no larger than that of the reference in the same dtype."""

from __future__ import annotations

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


def assert_as_exact_as_eager(operation: Operation, reference: Operation, arguments: Sequence[object]) -> None:
    """`operation` and `reference` on the same arguments, results and gradients, both against float64.

    Twice eager's error passes, and two units in the last place of the largest value: a handful of roundings is luck.
    """
    returned = reference(*arguments)
    outputs = returned if isinstance(returned, tuple) else (returned,)
    gradients = [torch.randn_like(output) for output in outputs]
    ours = results(operation, arguments, gradients)
    eager = results(reference, arguments, gradients)
    exact = results(reference, widened(arguments), gradients)
    for index, (our, other, true) in enumerate(zip(ours, eager, exact, strict=True)):
        assert our.shape == other.shape and our.dtype == other.dtype
        error, eager_error = (our - true).abs().max(), (other - true).abs().max()
        allowed = 2 * torch.maximum(eager_error, torch.finfo(our.dtype).eps * true.abs().max())
        assert error <= allowed, f"result {index}: error {error:.3g}, eager's {eager_error:.3g}, in {our.dtype}"
