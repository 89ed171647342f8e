"""Casts and products in float8 against float64, with bounds from the formats; what is converted, and what is not."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from titanlite_kernels.float8_reference import power_of_two
from torch import Tensor

from titanlite.cli.check import format_description
from titanlite.models.layers import Linear
from titanlite.models.llama_spec import PRESETS, SPEC
from titanlite.plan.describe import describe_run
from titanlite.plan.float8 import SETTINGS, Cast, Product, decide_linears, mean_size, summarize_linears
from titanlite.plan.rules import apply_rules
from titanlite.precision import float8
from titanlite.precision.float8 import (
    FORMATS,
    Float8Linear,
    convert,
    in_tiles,
    multiplies_blocks,
    quantise,
    refresh_casts,
)
from titanlite.recipe.sections import Float8, Recipe

BITS = {"e4m3": 3, "e5m2": 2}  # after the point
LOWEST = {"e4m3": -6, "e5m2": -14}  # exponent of the smallest value with all bits
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}  # relative error of a rounding


def spacings(x: Tensor, cast: Cast) -> Tensor:
    """Between the float8 values next to each of x [rows, columns], worked out from the formats, in float64."""
    x = x.double()
    if cast.scale == "block":
        return spacings(x.reshape(-1, 32), Cast(cast.format, "row")).view(x.shape)
    largest = x.abs().amax() if cast.scale == "tensor" else x.abs().amax(1, keepdim=True)
    top = {"e4m3": 448.0, "e5m2": 57344.0}[cast.format]
    scale = torch.exp2(torch.floor(torch.log2(top / largest)))
    exponents = torch.floor(torch.log2((x * scale).abs().clamp(min=1e-300))).clamp(min=LOWEST[cast.format])
    return torch.exp2(exponents - BITS[cast.format]) / scale


CASTS = [Cast("e4m3", "tensor"), Cast("e4m3", "row"), Cast("e5m2", "tensor"), Cast("e4m3", "block")]


@pytest.mark.parametrize("cast", CASTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_cast_is_off_by_half_a_spacing(cast: Cast, dtype: torch.dtype) -> None:
    """Over twelve decades within a row, and with what a transposed matrix's strides are."""
    x = (torch.randn(64, 96, dtype=torch.float64) * torch.logspace(-9, 3, 64, dtype=torch.float64)[:, None]).to(dtype)
    for matrix in (x, x.t()):
        cast_to = quantise(matrix, cast)
        assert cast_to.values.dtype == FORMATS[cast.format] and cast_to.values.is_contiguous()
        assert torch.equal(cast_to.scale.to(torch.float8_e8m0fnu).float(), cast_to.scale)
        error = (cast_to.widened(torch.float64) - matrix.double()).abs()
        spacing = spacings(matrix, cast)
        assert (error <= spacing / 2).all()
        assert (error > spacing / 3).any(), "or the spacings are too wide to say anything"


@given(st.floats(min_value=2.0**-99, max_value=2.0**120, width=32), st.sampled_from(list(FORMATS)))
def test_a_scale_is_a_power_of_two_that_fills_the_format(largest: float, name: str) -> None:
    factor = power_of_two(torch.tensor(largest), FORMATS[name]).item()
    assert math.frexp(factor)[0] == 0.5
    assert torch.finfo(FORMATS[name]).max / 2 < largest * factor <= torch.finfo(FORMATS[name]).max


def test_what_is_not_finite_stays_so() -> None:
    """In a whole tensor, or in the row that has it; an infinity does not become the format's largest value."""
    for bad in (math.nan, math.inf, -math.inf):
        x = torch.ones(3, 16)
        x[1, 5] = bad
        values, scale = quantise(x, Cast("e4m3", "tensor"))
        assert not (values.float() * scale).isfinite().any()
        values, scale = quantise(x, Cast("e4m3", "row"))
        assert (values.float() * scale).isfinite().all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("cast", CASTS, ids=str)
def test_zeros_and_the_smallest_numbers_are_kept_or_become_zero(cast: Cast) -> None:
    for x in (torch.zeros(2, 32), torch.full((2, 32), 1e-44)):
        assert torch.equal(quantise(x, cast).widened(torch.float32), torch.zeros(2, 32))


def test_scaling_by_another_power_of_two_rounds_alike() -> None:
    """Why no rank asks another for its scale: a larger value elsewhere changes only what was close to nothing."""
    x = torch.randn(512, 512)
    alone = quantise(x, Cast("e4m3", "tensor"))
    with_outlier = quantise(torch.cat([x, torch.full((1, 512), 11.3 * x.abs().max().item())]), Cast("e4m3", "tensor"))
    ours, theirs = (each.values.float()[:512] * each.scale for each in (alone, with_outlier))
    assert alone.scale != with_outlier.scale
    full = x.abs() * with_outlier.scale.reciprocal() >= 2.0**-6
    assert 0.99 < full.float().mean() < 1
    assert torch.equal(ours[full], theirs[full])
    assert (ours - theirs).abs().max() <= 2.0**-10 * with_outlier.scale


def gradients(multiply: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
    """Output, and gradients of x and weight."""
    x, weight = x.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    out = multiply(x, weight)
    out.backward(grad)
    assert x.grad is not None and weight.grad is not None
    assert (out.dtype, x.grad.dtype, weight.grad.dtype) == (x.dtype, x.dtype, weight.dtype)
    return [out.detach(), x.grad, weight.grad]


def assert_within(result: Tensor, left: Tensor, right: Tensor, casts: Product | None, dtype: torch.dtype) -> None:
    """`result` is left [m, k] times right [n, k] transposed, up to what rounding both factors makes of it.

    Each element within the worst case; all together as far off as independent roundings, each uniform over its
    spacing (variance spacing^2 / 12), are expected to be; one bit more or less would be a factor of two.
    """
    left, right = left.double(), right.double()
    true, summed = left @ right.t(), left.abs() @ right.t().abs()
    # float32 sums, and the result's own rounding.
    sums = (left.shape[1] * UNIT[torch.float32] * (dtype != torch.float64) + 2 * UNIT[dtype]) * summed
    error = (result.double() - true).abs()
    if casts is None:
        assert (error <= sums + left.shape[1] * UNIT[dtype] * summed).all()
        return
    of_left, of_right = spacings(left, casts.left), spacings(right, casts.right)
    worst = of_left / 2 @ right.t().abs() + (left.abs() + of_left / 2) @ of_right.t() / 2
    assert (error <= worst + sums).all()
    variance = (of_left**2 @ right.t() ** 2 + left**2 @ of_right.t() ** 2) / 12
    expected = variance.sum().sqrt()
    assert 0.8 * expected < error.norm() < 1.2 * (expected + (UNIT[dtype] * true).norm())


@pytest.mark.parametrize("tokens", [(2, 40), (3, 7)], ids=["80 tokens", "21 tokens"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("recipe", SETTINGS)
def test_products_are_as_exact_as_their_casts_say(recipe: str, dtype: torch.dtype, tokens: tuple[int, int]) -> None:
    """Channels and tokens of very different size, as a model's are; 21 is no multiple of 16."""
    how = SETTINGS[recipe]
    x = (torch.randn(*tokens, 96) * torch.logspace(-2, 1, 96)).to(dtype)
    weight = torch.randn(64, 96) * torch.logspace(0, -2, 96)
    grad = (torch.randn(*tokens, 64) * torch.logspace(-6, -3, tokens[1])[:, None]).to(dtype)
    weight = weight.double() if dtype == torch.float64 else weight
    out, grad_x, grad_weight = gradients(Float8Linear(how), x, weight, grad)
    rows, rounded, gradient = x.flatten(0, 1), weight.to(dtype), grad.flatten(0, 1)
    assert out.shape == (*tokens, 64) and grad_x.shape == x.shape
    assert_within(out.flatten(0, 1), rows, rounded, how.output, dtype)
    assert_within(grad_x.flatten(0, 1), gradient, rounded.t(), how.grad_input, dtype)
    assert_within(grad_weight, gradient.t(), rows.t(), how.grad_weight, dtype)


def place_in_tiles(row: int, block: int, blocks: int) -> int:
    """Where cuBLAS looks for a scale, by the formula of its documentation ("1D Block Scaling Factors Layout")."""
    tile = row // 128 * math.ceil(blocks / 4) + block // 4
    return 512 * tile + row % 32 * 16 + row % 128 // 32 * 4 + block % 4


@pytest.mark.parametrize(("rows", "blocks"), [(1, 2), (128, 4), (130, 5), (300, 17), (256, 8)])
def test_scales_are_where_the_device_looks_for_them(rows: int, blocks: int) -> None:
    scale = torch.exp2(torch.randint(-117, 117, (rows, blocks)).float())
    scale[0, 1] = math.nan
    tiles = in_tiles(scale)
    assert tiles.dtype == torch.float8_e8m0fnu and tiles.is_contiguous()
    assert tiles.numel() == 512 * math.ceil(rows / 128) * math.ceil(blocks / 4)
    places = [place_in_tiles(row, block, blocks) for row in range(rows) for block in range(blocks)]
    assert len(set(places)) == rows * blocks
    assert torch.equal(tiles.float()[places].view(rows, blocks).nan_to_num(3.0), scale.nan_to_num(3.0)), "exact"
    assert tiles.isnan().sum() == 1, "and nothing that fills up a tile is NaN, which would spread"


def of_blocks(left: Tensor, right: Tensor, scale_a: Tensor, scale_b: Tensor, **how: Any) -> Tensor:
    """A device that multiplies blocks, in the place of torch._scaled_mm."""
    widened = []
    for values, tiles in ((left, scale_a), (right.t(), scale_b)):
        rows, blocks = values.shape[0], values.shape[1] // 32
        places = [place_in_tiles(row, block, blocks) for row in range(rows) for block in range(blocks)]
        assert tiles.dtype == torch.float8_e8m0fnu
        scale = tiles.float()[places].view(rows, blocks, 1)
        widened.append((values.float().unflatten(1, (blocks, 32)) * scale).flatten(1))
    assert not how["use_fast_accum"]
    return (widened[0] @ widened[1].t()).to(how["out_dtype"])


def test_native_products_of_blocks_are_the_emulated_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """All three, given to a device that finds its scales by formula; float64 stays exact."""
    x, weight, grad = torch.randn(70, 160), torch.randn(192, 160), torch.randn(70, 192)
    emulated = gradients(Float8Linear(SETTINGS["mxfp8"]), x, weight, grad)
    exact = gradients(Float8Linear(SETTINGS["mxfp8"]), *(each.double() for each in (x, weight, grad)))
    monkeypatch.setattr(torch, "_scaled_mm", of_blocks)
    linear = Float8Linear(SETTINGS["mxfp8"], native_blocks=True)
    for here, there in zip(gradients(linear, x, weight, grad), emulated, strict=True):
        assert (here - there).norm() < 1e-6 * there.norm()
    assert all(map(torch.equal, gradients(linear, *(each.double() for each in (x, weight, grad))), exact))


@pytest.mark.parametrize(("capability", "native"), [((9, 0), False), ((10, 0), True), ((12, 0), True)])
def test_the_device_decides_who_multiplies_blocks(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], native: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert multiplies_blocks(torch.device("cuda")) is native
    assert not multiplies_blocks(torch.device("cpu"))


def converted(recipe: str, rows: int) -> tuple[torch.nn.ModuleDict, list[torch.nn.Module]]:
    """A model of one linear [rows, 32], and those of its modules whose casts are kept."""
    model = torch.nn.ModuleDict({"linear": Linear(32, rows)})
    torch.nn.init.normal_(model["linear"].weight)
    found = [float8.LinearDecision("linear", (rows, 32), None)]
    return model, convert(model, found, SETTINGS[recipe], cache=True)


@pytest.mark.parametrize("recipe", SETTINGS)
def test_kept_weights_give_the_same_bits(recipe: str) -> None:
    model, kept = converted(recipe, 64)
    (linear,) = kept
    for _ in range(2):
        with torch.no_grad():
            linear.weight.mul_(-3)
        refresh_casts(kept, torch.bfloat16)
        arguments = torch.randn(16, 32).bfloat16(), linear.weight, torch.randn(16, 64).bfloat16()
        anew = gradients(Float8Linear(SETTINGS[recipe]), *arguments)
        assert all(map(torch.equal, gradients(linear.multiply, *arguments), anew))
    assert list(model.state_dict()) == ["linear.weight"]


def test_kept_weights_are_cast_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """For each microbatch, x and its gradient are left: the latter, as the weight, in one cast for both products."""
    _, kept = converted("tensorwise", 48)
    cast: list[tuple[int, ...]] = []
    for name in ("quantise_reference", "quantise_both_reference"):
        operation = getattr(float8, name)
        monkeypatch.setattr(
            float8,
            name,
            lambda matrix, *how, operation=operation: (cast.append(tuple(matrix.shape)), operation(matrix, *how))[1],
        )
    refresh_casts(kept, torch.float32)
    assert cast == [(48, 32)]
    cast.clear()
    gradients(kept[0].multiply, torch.randn(16, 32), kept[0].weight, torch.randn(16, 48))
    assert cast == [(16, 32), (16, 48), (32, 16)]


def recipe(preset: str = "debug", world: dict[str, Any] | None = None, **keys: Any) -> Recipe:
    section = {"enabled": True, **keys}
    return Recipe.model_validate(
        {
            "model": {"preset": preset},
            "training": {"steps": 10, "sequence_length": 256},
            "precision": {"float8": section},
            "parallel": world or {},
        }
    )


@pytest.mark.parametrize(
    ("preset", "keys", "said"),
    [
        ("llama3-8b", {}, "converted 224 of 225 linears; skipped: head (excluded)"),
        ("llama3-8b", {"exclude": []}, "converted 225 of 225 linears"),
        (
            "llama3.2-1b",
            {"exclude": ["layers.*.attention.wo"]},
            "converted 64 of 113 linears; skipped: layers.*.attention.wk, layers.*.attention.wv (below min_size 1024), "
            "layers.*.attention.wo (excluded), head (shares the embedding's weight)",
        ),
        ("debug", {"min_size": 0, "exclude": ["head", "layers.2.ffn.up"]}, "converted 27 of 29 linears; skipped: "
         "layers.*.ffn.up, head (excluded)"),
    ],
)  # fmt: skip
def test_what_is_converted(preset: str, keys: dict[str, Any], said: str) -> None:
    assert summarize_linears(decide_linears(SPEC, PRESETS[preset], Float8(enabled=True, **keys))) == said


def test_sizes_that_are_no_multiples_of_16_are_skipped() -> None:
    config = replace(PRESETS["debug"], ffn_dim=392)
    found = decide_linears(SPEC, config, Float8(enabled=True, min_size=0))
    skipped = {each.name.rpartition(".")[2] for each in found if each.skipped == "not in multiples of 16"}
    assert skipped == {"gate", "up", "down"} and decide_linears(SPEC, config, Float8()) == ()


@settings(deadline=None)
@given(st.integers(16, 10**5), st.integers(16, 10**5))
def test_the_mean_size_is_between_the_smaller_one_and_twice_that(outputs: int, inputs: int) -> None:
    smaller = min(outputs, inputs)
    assert smaller * (1 - 1e-12) <= mean_size(outputs, inputs) < 2 * smaller


@pytest.mark.parametrize("preset", ["debug", "125m"])
def test_the_model_has_the_linears_that_are_decided_on(preset: str) -> None:
    """By its modules and by the spec's shapes; parameters keep their names."""
    with torch.device("meta"):
        model = SPEC.build(PRESETS[preset], torch.bfloat16)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    found = decide_linears(SPEC, PRESETS[preset], Float8(enabled=True, min_size=0))
    assert {each.name: each.shape for each in found} == {name: tuple(m.weight.shape) for name, m in linears.items()}
    before = list(model.state_dict())
    kept = convert(model, found, SETTINGS["tensorwise"], cache=True)
    assert list(model.state_dict()) == before
    multiplying = [name for name, module in linears.items() if isinstance(module.multiply, Float8Linear)]
    assert multiplying == [name for name in linears if name != "head"]
    assert len(kept) == len(multiplying)


@pytest.mark.parametrize(
    ("severity", "key", "world", "values"),
    [
        ("warning", "precision.float8.enabled", 1, recipe()),
        ("error", "precision.float8.exclude", 1, recipe(min_size=0, exclude=["layers.*.wq"])),
        ("error", "parallel.tp", 3, recipe("30m", {"tp": 3, "dp_shard": 1}, min_size=0)),
        ("warning", "precision.float8.exclude", 8, recipe("llama3-8b", {"tp": 8})),
        (
            "error", "precision.float8.enabled", 2,
            recipe(min_size=0, world={"pp": 2, "pipeline": {"schedule": "ZBVZeroBubble"}}),
        ),
        ("warning", "precision.float8.recipe", 1, recipe(recipe="mxfp8")),
        ("warning", "precision.float8.all_gather", 1, recipe(min_size=0, all_gather=True)),
        ("warning", "precision.float8.all_gather", 2,
         recipe(min_size=0, all_gather=True, recipe="mxfp8", world={"tp": 2})),
        ("warning", "precision.float8.min_size", 1, recipe(enabled=False, min_size=0)),
        ("warning", "precision.float8.recipe", 1, recipe(enabled=False, recipe="rowwise")),
        ("", "", 1, recipe(min_size=0)),
        ("", "", 2, recipe(min_size=0, all_gather=True, world={"tp": 2})),
        ("", "", 2, recipe(min_size=0, world={"pp": 2})),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_wrong_with_a_recipe(severity: str, key: str, world: int, values: Recipe) -> None:
    found = {(finding.severity, finding.key) for finding in apply_rules(values, world)}
    if key:
        assert (severity, key) in found
    else:
        assert not [each for each in found if "float8" in each[1] or each[0] == "error"]


def test_check_says_what_is_sent_in_float8() -> None:
    """Over tp module by module; shards of weights where there are any."""
    section = {"min_size": 0, "all_gather": True}
    lines = [
        line.strip() for line in format_description(recipe(**section, world={"tp": 2, "dp_shard": 2}), 4).splitlines()
    ]
    begin = lines.index("sent, shards of weights: e4m3")
    assert lines[begin + 1 : begin + 4] == [
        "sent over tp, inputs of layers.*.attention, layers.*.ffn: e4m3",
        "sent over tp, gradients of layers.*.attention.wo, layers.*.ffn.down: e5m2",
        "sent over tp, inputs of head: as computed (head: excluded)",
    ]
    assert "shards of weights" not in format_description(recipe(**section, world={"tp": 2}), 2)
    assert "sent over tp" not in format_description(recipe(**section), 2)
    assert "sent" not in format_description(recipe(min_size=0, world={"tp": 2, "dp_shard": 2}), 4)


def test_no_tokens_and_no_second_derivatives() -> None:
    weight = torch.randn(32, 64, requires_grad=True)
    linear = Float8Linear(SETTINGS["tensorwise"])
    assert linear(torch.empty(2, 0, 64), weight).shape == (2, 0, 32)
    x = torch.randn(16, 64, requires_grad=True)
    (once,) = torch.autograd.grad(linear(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        once.sum().backward()


@pytest.mark.slow
# Of blocks, inductor of torch 2.13 cannot split the loops on a CPU: it raises.
@pytest.mark.parametrize("recipe", [name for name in SETTINGS if name != "mxfp8"])
def test_compiled_casts_and_products_give_the_same_bits(recipe: str) -> None:
    """In one graph, with a kept weight: what is cast outside of it does not depend on what the compiler fuses."""
    weight = torch.nn.Parameter(torch.randn(96, 64))
    linear = Float8Linear(SETTINGS[recipe], weight)
    linear.refresh(weight.detach().bfloat16())
    arguments = torch.randn(2, 21, 64).bfloat16(), weight, torch.randn(2, 21, 96).bfloat16()
    compiled = torch.compile(linear, fullgraph=True, dynamic=False)
    assert all(map(torch.equal, gradients(compiled, *arguments), gradients(linear, *arguments)))


def test_kept_weights_are_counted() -> None:
    """A byte for each of two products, of all matrices of the blocks; sharded ones are not kept."""
    matrices = 4 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 384)
    assert describe_run(recipe(min_size=0))["state_bytes"]["float8"] == 2 * matrices
    assert describe_run(recipe(min_size=0, world={"zero_stage": 0}), 2)["state_bytes"]["float8"] == 2 * matrices
    assert "float8" not in describe_run(recipe(min_size=0), 2)["state_bytes"]
    assert "float8" not in describe_run(Recipe.model_validate({"training": {"steps": 1}}))["state_bytes"]
