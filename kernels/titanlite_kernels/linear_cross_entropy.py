"""Linear + cross-entropy: the sum over tokens of -log softmax(hidden weight^T)[label], never all logits at a time.

Shapes: hidden [..., dim], weight [vocab, dim], labels [...] int64; any float dtypes, sums in at least float32.

A chunk of tokens has its logits formed, turned into their own gradient where they lie, and multiplied into both
gradients, all in the forward pass; the backward pass only scales these, where they lie. That is the arithmetic of the
plain path (6 n dim vocab operations), at the price of the weight's gradient being held, in at least float32, until
then; rounded to a narrower dtype, it has that memory as long as it lives. With
`recompute`, the forward pass keeps three numbers per token, and the backward pass forms the logits anew (8 n dim
vocab), a chunk of the vocabulary at a time, so that each row of the weight's gradient is one product, rounded once; so
does the forward pass, whose numbers are then those of the very same logits. It is meant for who runs many forward
passes before the first backward one.

Bytes, for n tokens of a chunk and b bytes a logit: statistics n vocab b (read), gradient 2 n vocab b (read, written).
Both in one launch read each row twice, the second time from the cache: a row of Llama 3's, 256 KB, does not fit into
registers. A product fused with the softmax would save the forward of `recompute` 2 n vocab b, a tenth of the product's
own time at dim 4096 on an H200: less than what a product in Triton loses to cuBLAS there. So there is none.

The softmax by chunks is Milakov & Gimelshein's (2018); gradients in the forward pass are Liger-Kernel's idea (2024).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from titanlite_kernels.build import Build
from titanlite_kernels.optional_triton import cdiv, jit, serves, tl, wrap_triton

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

BLOCK = 4096
WARPS = 8
CHUNK = 4096  # on a GPU of 80 GB


def tokens_at_a_time(device_kind: str, memory_bytes: int = 80 * 10**9) -> int:
    """Tokens whose logits are in memory at a time on that kind of device, such as `cuda`: enough that the products take
    longer than to read and write the weight's gradient, once a chunk; few enough to add little to it in float32.

    On GPUs they grow with the memory: 4,096 of 80 GB, whose logits are 1 GB for Llama 3's vocabulary in bfloat16.
    """
    if device_kind == "cpu":
        return 512
    fitting = max(1, CHUNK * memory_bytes // (80 * 10**9))
    return min(max(1 << fitting.bit_length() - 1, 512), 8192)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weights: Tensor | None = None,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    recompute: bool = False,
    chunk: int | None = None,
    backend: Literal["auto", "triton", "torch"] = "auto",
    wide_products: bool | None = None,
    group: ProcessGroup | None = None,
    first: int = 0,
) -> Tensor:
    """The sum over tokens of token_weight * (-log softmax(logits)[label] + z_loss * logsumexp(logits)^2).

    A scalar in at least float32, differentiable by `hidden` and `weight`.

    The weight may be wider than `hidden`: it is rounded to its dtype for the products, and its gradient is not.
    Tokens labelled `ignore_index` count 0, whatever their logits. Another label outside the vocabulary makes the loss
    infinite. `chunk`: tokens at a time. `wide_products`: form the products of a narrow `hidden` in float32; the default
    on CPUs.

    With a `group` each rank has the rows of the weight that begin at `first`, and the same hidden states and labels;
    three numbers a token travel. The result is the whole loss, on every rank. The gradient of `hidden` is then this
    rank's summand, for the caller to sum.
    """
    rows, dim = labels.numel(), weight.shape[1]
    if hidden.shape[-1] != dim or hidden.shape[:-1] != labels.shape:
        shapes = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, labels {tuple(labels.shape)}"
        raise ValueError(f"{shapes} do not fit: [..., dim], [vocab, dim] and [...] are needed")
    if backend not in ("auto", "triton", "torch") or (chunk is not None and chunk < 1):
        raise ValueError(f"backend {backend!r} must be auto, triton or torch, and chunk {chunk} at least 1")
    if backend == "triton" and hidden.dtype == torch.float64:
        raise ValueError("the Triton kernels compute in float32: for float64, backend must be 'torch' or 'auto'")
    grad = torch.is_grad_enabled()
    how = _How(
        want_hidden=grad and hidden.requires_grad,
        want_weight=grad and weight.requires_grad,
        z_loss=float(z_loss),
        recompute=recompute,
        chunk=chunk or tokens_at_a_time(hidden.device.type),
        triton=serves(hidden) if backend == "auto" else backend == "triton",
        wide_products=hidden.device.type == "cpu" if wide_products is None else wide_products,
        group="" if group is None else group.group_name,
        ranks=1 if group is None else group.size(),
        first=first,
    )
    labels = labels.reshape(rows).contiguous()  # a kernel reads them one after the other
    counted = labels != ignore_index
    weights = counted.to(_wide(hidden.dtype))
    if token_weights is not None:
        weights = torch.where(counted, token_weights.detach().reshape(rows).to(weights.dtype), 0)
    return _LinearCrossEntropy.apply(hidden.reshape(rows, dim), weight, labels, weights, how)[0]


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weights: Tensor | None = None,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
) -> Tensor:
    """The same by all logits at once."""
    logits = F.linear(hidden, weight.to(hidden.dtype)).flatten(0, -2)
    logits = logits.to(_wide(logits.dtype))
    labels = labels.flatten()
    losses = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="none")
    losses = losses + z_loss * logits.logsumexp(1).square()
    scale = 1 if token_weights is None else token_weights.flatten()
    return (losses * scale).where(labels != ignore_index, 0).sum()


class _How(NamedTuple):
    """What a call computes, apart from its tensors."""

    want_hidden: bool
    want_weight: bool
    z_loss: float
    recompute: bool
    chunk: int
    triton: bool
    wide_products: bool
    group: str
    ranks: int
    first: int


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _LinearCrossEntropy(torch.autograd.Function):
    """Plain Python around torch's operations in eager mode, so that memory counters see them all. Compilers are
    shown two operations that they leave alone, so that no fusion brings the logits back together.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, how: _How
    ) -> tuple[Tensor, ...]:
        run: Any = forward_op if torch.compiler.is_compiling() else _forward
        loss, statistics, grad_hidden, grad_weight = run(hidden, weight, labels, weights, *how)
        ctx.how, ctx.dtypes = how, (hidden.dtype, weight.dtype)
        if how.recompute:
            ctx.save_for_backward(hidden, weight, labels, weights, statistics)
        else:
            ctx.save_for_backward(grad_hidden, grad_weight)
        return (loss,)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.how.recompute:
            run: Any = backward_op if torch.compiler.is_compiling() else _backward
            grads = run(*ctx.saved_tensors, grad, *ctx.how)
        else:
            compiling = torch.compiler.is_compiling()
            last = not (compiling or torch._C._autograd._get_current_graph_task_keep_graph())
            grads = [_scale(each, grad, dtype, last) for each, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
        grad_hidden, grad_weight = (each if wanted else None for each, wanted in zip(grads, ctx.how[:2], strict=True))
        return grad_hidden, grad_weight, None, None, None


def _scale(x: Tensor, scale: Tensor, dtype: torch.dtype, in_place: bool) -> Tensor:
    """x [rows, dim] * scale in that dtype, no wider than x's. In place, a block's result is written over the block and
    those before it: so the gradient of a large vocabulary is never there twice.
    """
    if x.dtype == dtype:
        return x.mul_(scale) if in_place else x * scale
    if torch.compiler.is_compiling():
        return (x * scale).to(dtype)
    out = x.view(-1).view(dtype)[: x.numel()].view(x.shape) if in_place else torch.empty_like(x, dtype=dtype)
    for part, into in zip(torch.split(x, _ROWS), torch.split(out, _ROWS), strict=True):
        into.copy_(part * scale)
    return out


def _forward(
    hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss; each token's statistics; the gradients before they are scaled, empty where unwanted or recomputed."""
    how, wide = _How(*rest), _wide(hidden.dtype)
    want_hidden, want_weight, z_loss, recompute, chunk, triton, _, _, ranks, first = how
    factor = _round(weight, hidden.dtype, how.wide_products)
    statistics = weights.new_empty(3, hidden.shape[0], dtype=torch.float64)
    grad_hidden = hidden.new_zeros(hidden.shape if want_hidden and not recompute else (0,), dtype=wide)
    grad_weight = weight.new_zeros(weight.shape if want_weight and not recompute else (0,), dtype=wide)
    gradient = bool(grad_hidden.numel() or grad_weight.numel())

    def run(rows: slice) -> None:
        part, scale = hidden[rows].to(factor.dtype), weights[rows]
        logits = part @ factor.t()
        at_once = gradient and ranks == 1
        found = _statistics(logits, labels[rows], first, triton, scale if at_once else None, z_loss)
        statistics[:, rows] = found = _of_all_ranks(found, how)
        if gradient and not at_once:
            _gradient(logits, labels[rows], found, scale, first, z_loss, triton)
        if grad_hidden.numel():
            _add_product(grad_hidden[rows], logits, factor)
        if grad_weight.numel():
            _add_product(grad_weight, logits.t(), part)

    if recompute:
        # By the backward pass's own products: others may round the last place of a logit otherwise, and of a large
        # logit that place is a large part of a probability.
        x = hidden.to(factor.dtype)
        found = [
            _statistics(x @ factor[columns].t(), labels, first + columns.start, triton)
            for columns in _columns_at_a_time(hidden, weight, chunk)
        ]
        statistics = _of_all_ranks(_join(torch.stack(found)), how)
    else:
        for start in range(0, hidden.shape[0], chunk):
            run(slice(start, start + chunk))
    top, log_total, target = statistics
    losses = log_total - (target - top) + z_loss * (top + log_total).square()
    loss = torch.where(weights != 0, weights * losses, 0).sum().to(wide)
    return loss, statistics, grad_hidden, grad_weight


def _backward(
    hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, statistics: Tensor, grad: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    """The gradients from recomputed logits, empty where unwanted."""
    how, wide = _How(*rest), _wide(hidden.dtype)
    factor = _round(weight, hidden.dtype, how.wide_products)
    scale, x = weights * grad, hidden.to(factor.dtype)
    grad_hidden = hidden.new_zeros(hidden.shape if how.want_hidden else (0,), dtype=wide)
    grad_weight = weight.new_zeros(weight.shape if how.want_weight else (0,))
    for columns in _columns_at_a_time(hidden, weight, how.chunk):
        part = factor[columns]
        logits = x @ part.t()
        _gradient(logits, labels, statistics, scale, how.first + columns.start, how.z_loss, how.triton)
        if how.want_hidden:
            _add_product(grad_hidden, logits, part)
        if how.want_weight and grad_weight.dtype == wide:
            _add_product(grad_weight[columns], logits.t(), x)
        elif how.want_weight:
            grad_weight[columns] = logits.t() @ x
        del logits  # before the next ones are formed
    return grad_hidden.to(hidden.dtype), grad_weight


def _columns_at_a_time(hidden: Tensor, weight: Tensor, chunk: int) -> list[slice]:
    """Of all tokens' logits: as many at a time as in a chunk of tokens, in rows that are aligned to vectors."""
    width = max(16, chunk * weight.shape[0] // max(1, hidden.shape[0]) // 16 * 16)
    return [slice(start, start + width) for start in range(0, weight.shape[0], width)]


_SIGNATURE = (
    "bool want_hidden, bool want_weight, float z_loss, bool recompute, int chunk, bool triton, bool wide_products, "
    "str group, int ranks, int first"
)
forward_op = torch.library.custom_op(
    "titanlite_kernels::linear_cross_entropy",
    _forward,
    mutates_args=(),
    schema=f"(Tensor hidden, Tensor weight, Tensor labels, Tensor weights, {_SIGNATURE}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
backward_op = torch.library.custom_op(
    "titanlite_kernels::linear_cross_entropy_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor labels, Tensor weights, Tensor statistics, Tensor grad, "
    f"{_SIGNATURE}) -> (Tensor, Tensor)",
)


@forward_op.register_fake
def _(
    hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    how, wide = _How(*rest), _wide(hidden.dtype)
    return (
        weights.new_empty(()),
        weights.new_empty(3, hidden.shape[0], dtype=torch.float64),
        hidden.new_empty(hidden.shape if how.want_hidden and not how.recompute else (0,), dtype=wide),
        weight.new_empty(weight.shape if how.want_weight and not how.recompute else (0,), dtype=wide),
    )


@backward_op.register_fake
def _(
    hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, statistics: Tensor, grad: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    how = _How(*rest)
    grad_hidden = hidden.new_empty(hidden.shape if how.want_hidden else (0,))
    return grad_hidden, weight.new_empty(weight.shape if how.want_weight else (0,))


# ---- products --------------------------------------------------------------------------------------------------------


def _round(weight: Tensor, dtype: torch.dtype, wide_products: bool) -> Tensor:
    """The weight as products take it: rounded like the hidden states, in the dtype that products are formed in."""
    rounded = weight.to(dtype)
    return rounded.to(_wide(dtype)) if wide_products else rounded


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, where the total may be wider than what is multiplied."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.device.type == "cpu":
        # The CPU has no product that ends in a wider sum. Rounded before they are added, the parts of many chunks would
        # be further from the sum than one rounded product of all: so they are formed as wide as the sum.
        for part, rows in zip(torch.split(total, _ROWS), torch.split(a, _ROWS), strict=True):
            for left, right in zip(torch.split(rows, _ROWS, dim=1), torch.split(b, _ROWS), strict=True):
                part.addmm_(left.to(total.dtype), right.to(total.dtype))
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


_ROWS = 4096  # of a matrix that is as large as the weight, rows that temporary tensors hold at a time


# ---- a chunk of logits -----------------------------------------------------------------------------------------------


def _statistics(
    logits: Tensor, labels: Tensor, first: int, triton: bool, scale: Tensor | None = None, z_loss: float = 0.0
) -> Tensor:
    """logits [n, columns], labels [n] -> [3, n] float64: the largest logit; the log of the sum of exp(logit - largest);
    the label's logit (-inf where it is elsewhere). With a `scale`, the logits then become their gradient: see below.

    Not the sum of the first two: that would be rounded to a logit's last place, and a probability be wrong by as much.
    """
    if triton:
        return statistics_op(logits, labels, scale, first, z_loss)
    found, rows = [], _rows_at_a_time(logits)
    for start in range(0, max(1, len(logits)), rows):
        part, columns = logits[start : start + rows], labels[start : start + rows] - first
        wide = part.to(_wide(part.dtype))
        found.append(_reference_statistics(wide, columns))
        if scale is not None:
            _reference_gradient(part, wide, columns, found[-1], scale[start : start + rows], z_loss)
    return torch.cat(found, dim=1)


def _gradient(
    logits: Tensor, labels: Tensor, statistics: Tensor, scale: Tensor, first: int, z_loss: float, triton: bool
) -> None:
    """Turn logits into the gradient of scale * loss by them; 0 where the scale is."""
    if triton:
        gradient_op(logits, labels, statistics, scale, first, z_loss)
        return
    rows = _rows_at_a_time(logits)
    cut = (torch.split(x, rows) for x in (logits, labels, statistics.t(), scale))
    for part, label, found, each in zip(*cut, strict=True):
        _reference_gradient(part, part.to(scale.dtype), label - first, found.t(), each, z_loss)


def _rows_at_a_time(logits: Tensor) -> int:
    """So few that several passes over their logits find them in a CPU's cache, and that a card's are all busy."""
    values = 2**20 if logits.device.type == "cpu" else 2**25
    return max(1, values // max(1, logits.shape[1]))


def _reference_statistics(wide: Tensor, columns: Tensor) -> Tensor:
    here = (columns >= 0) & (columns < wide.shape[1])
    target = wide.gather(1, columns.clamp(0, wide.shape[1] - 1).unsqueeze(1)).squeeze(1)
    top = wide.amax(1)
    total = (wide - top.unsqueeze(1)).exp_().sum(1)
    return torch.stack((top.double(), total.double().log(), target.masked_fill(~here, -torch.inf).double()))


def _reference_gradient(
    logits: Tensor, wide: Tensor, columns: Tensor, statistics: Tensor, scale: Tensor, z_loss: float
) -> None:
    """`wide` is `logits`, or a copy; it is written on too."""
    here = ((columns >= 0) & (columns < wide.shape[1])).unsqueeze(1)
    at = columns.clamp(0, wide.shape[1] - 1).unsqueeze(1)
    top, log_total, _ = (each.unsqueeze(1) for each in statistics)
    scale = scale.unsqueeze(1)
    extra = scale * (2 * z_loss) * (top + log_total)
    # What concerns a whole row is in float64: its rounding would be that of all its gradients.
    of_total = log_total.neg().exp()
    probability = wide.sub_(top.to(wide.dtype)).exp_().gather(1, at) * of_total
    # Where a probability is about 1, nearly nothing is left of scale * (1 - 1): so it is not added to first.
    of_label = scale * (probability - here.double()) + extra * probability
    wide.mul_(((scale + extra) * of_total).to(wide.dtype)).scatter_(1, at, of_label.to(wide.dtype))
    wide.masked_fill_(scale == 0, 0)
    if wide is not logits:
        logits.copy_(wide)


def _of_all_ranks(statistics: Tensor, how: _How) -> Tensor:
    """The statistics [3, n] of all ranks' parts of the vocabulary, as those of the whole."""
    if how.ranks == 1:
        return statistics
    gathered = torch.ops._c10d_functional.all_gather_into_tensor(statistics.contiguous(), how.ranks, how.group)
    return _join(torch.ops._c10d_functional.wait_tensor(gathered).view(how.ranks, 3, -1))


def _join(parts: Tensor) -> Tensor:
    """The statistics [parts, 3, n] of parts of the vocabulary, as those of the whole [3, n]."""
    tops, log_totals, targets = parts.unbind(1)
    top = tops.amax(0)
    return torch.stack((top, (tops - top + log_totals).logsumexp(0), targets.amax(0)))


@jit
def _rows(
    logits, labels, statistics, scale, rows, columns, stride, first, z_loss,
    GIVEN: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program a row. GIVEN: the statistics are read, not written. GRADIENT: the row becomes its gradient."""
    wide: tl.constexpr = tl.float64 if logits.dtype.element_ty == tl.float32 else tl.float32
    row = tl.program_id(0)
    start = logits + row.to(tl.int64) * stride
    label = tl.load(labels + row) - first
    at = tl.arange(0, BLOCK)
    factor = 1.0
    if GRADIENT:
        factor = tl.load(scale + row).to(wide)
    if GIVEN:
        top = tl.load(statistics + row).to(wide)
        log_total = tl.load(statistics + rows + row).to(wide)
    else:
        here = (label >= 0) & (label < columns)
        target = tl.load(start + label, mask=here, other=-float("inf")).to(wide)
        # Finite at first: of -inf alone the maximum would be -inf too, and their difference no number.
        top = tl.full((), -3.0e38, wide)
        total = tl.full((), 0.0, wide)
        for offset in range(0, columns, BLOCK):
            x = tl.load(start + offset + at, mask=offset + at < columns, other=-float("inf")).to(wide)
            higher = tl.maximum(top, tl.max(x, 0))
            total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), 0)
            top = higher
        log_total = tl.log(total)
        tl.store(statistics + row, top)
        tl.store(statistics + rows + row, log_total)
        tl.store(statistics + 2 * rows + row, target)
    if GRADIENT:
        tl.debug_barrier()  # the label's logit was read by all threads, and one of them writes it
        extra = factor * (2 * z_loss * (top + log_total))
        read = tl.where(factor != 0, columns, 0)  # of a token that does not count, nothing
        for offset in range(0, columns, BLOCK):
            x = tl.load(start + offset + at, mask=offset + at < read, other=0.0).to(wide)
            probability = tl.exp(x - top - log_total)
            # Not (factor + extra) * probability - factor: of a probability of about 1 nearly nothing would be left.
            grad = factor * (probability - tl.where(offset + at == label, 1.0, 0.0)) + extra * probability
            tl.store(start + offset + at, tl.where(factor != 0, grad, 0.0), mask=offset + at < columns)


def _launch(
    logits: Tensor, labels: Tensor, statistics: Tensor, scale: Tensor, first: int, z_loss: float, **flags: bool
) -> None:
    rows, columns = logits.shape
    if rows:
        wrap_triton(_rows)[(rows,)](
            logits, labels, statistics, scale, rows, columns, logits.stride(0), first, z_loss,
            BLOCK=BLOCK, num_warps=WARPS, **flags,
        )  # fmt: skip


@torch.library.triton_op("titanlite_kernels::softmax_statistics_", mutates_args=("logits",))
def statistics_op(logits: Tensor, labels: Tensor, scale: Tensor | None, first: int, z_loss: float) -> Tensor:
    statistics = logits.new_empty(3, logits.shape[0], dtype=torch.float64)
    factor, gradient = statistics if scale is None else scale, scale is not None
    _launch(logits, labels, statistics, factor, first, z_loss, GIVEN=False, GRADIENT=gradient)
    return statistics


@torch.library.triton_op("titanlite_kernels::softmax_gradient_", mutates_args=("logits",))
def gradient_op(logits: Tensor, labels: Tensor, statistics: Tensor, scale: Tensor, first: int, z_loss: float) -> None:
    _launch(logits, labels, statistics, scale, first, z_loss, GIVEN=True, GRADIENT=True)


@statistics_op.register_fake
def _(logits: Tensor, *rest: Any) -> Tensor:
    return logits.new_empty(3, logits.shape[0], dtype=torch.float64)


@gradient_op.register_fake
def _(logits: Tensor, *rest: Any) -> None:
    return None


def _build(name: str, of: str, columns: int) -> Build:
    def launch(dtype: torch.dtype) -> None:
        logits, scale = torch.empty(CHUNK, columns, dtype=dtype, device="meta"), torch.empty(CHUNK, device="meta")
        labels, statistics = (torch.empty(size, device="meta") for size in (CHUNK, (3, CHUNK)))
        flags = {"GIVEN": name == "gradient", "GRADIENT": name != "statistics"}
        _launch(logits, labels.long(), statistics.double(), scale, 0, 0.0, **flags)

    return Build(
        name=f"linear_cross_entropy.{name}",
        launch=launch,
        shape=f"Llama 3{of}: {CHUNK:,} tokens x {columns:,}, bfloat16",
        minimal_bytes=(1 if name == "statistics" else 2) * 2 * CHUNK * columns,
        trips=(cdiv(columns, BLOCK),) * (2 if name == "statistics_and_gradient" else 1),
    )


BUILDS = tuple(
    _build(name, of, columns)
    for of, columns in (("", 128_256), (" over tp 8", 16_032))
    for name in ("statistics", "gradient", "statistics_and_gradient")
)
