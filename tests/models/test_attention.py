"""Attention by lengths, against a mask of all queries and keys in float64, by each of its kernels."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.dense_attention import dense_attention, random_documents
from support.flash_on_cpu import flash_on_cpu
from torch import Tensor
from torch.nn.attention import _cur_sdpa_kernel_backends

from titanlite.models.attention import products, varlen
from titanlite.models.attention.kernels import attention_kernels, kernel_in_use
from titanlite.models.layers import causal_attention
from titanlite.models.llama_spec import PRESETS

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def compare(batch: int, queries: int, keys: int, heads: tuple[int, int], documents: Tensor | None, window: int) -> None:
    """Results and gradients."""
    inputs = random(batch, queries, heads[0], 8), *(random(batch, keys, heads[1], 8) for _ in range(2))
    expected, found = (how(*inputs, documents, window) for how in (dense_attention, causal_attention))
    torch.testing.assert_close(found, expected, **CLOSE)
    grad = torch.randn_like(expected)
    pair = [torch.autograd.grad(out, inputs, grad) for out in (found, expected)]
    for ours, theirs in zip(*pair, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 40), st.sampled_from([(1, 1), (4, 2), (6, 2)]), st.booleans(), st.integers(0, 45),
    st.sampled_from([3, 256]), st.integers(0, 99),
)  # fmt: skip
def test_documents_and_windows(
    batch: int, length: int, heads: tuple[int, int], documents: bool, window: int, rows: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "_ROWS", rows)
        compare(batch, length, length, heads, random_documents(batch, length, generator) if documents else None, window)


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("queries", [1, 3, 8])
def test_queries_after_cached_keys(queries: int, window: int) -> None:
    compare(2, queries, 11, (6, 2), None, window)


def test_narrow_dtypes_are_rounded_once() -> None:
    """Against the same numbers in float64, within two roundings of the largest."""
    documents = torch.tensor([0, 30, 31, 64], dtype=torch.int32)
    exact = [torch.randn(1, 64, heads, 16).bfloat16().double() for heads in (4, 2, 2)]
    for window in (0, 9):
        found = causal_attention(*(x.bfloat16() for x in exact), documents, window)
        expected = dense_attention(*exact, documents, window)
        assert found.dtype == torch.bfloat16
        assert (found.double() - expected).abs().max() <= 2 * 2**-8 * expected.abs().max()


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("window", [0, 1, 6])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
def test_the_path_of_cuda(heads: tuple[int, int], window: int, documents: bool) -> None:
    offsets = random_documents(2, 24, torch.Generator().manual_seed(3)) if documents else None
    with flash_on_cpu():
        compare(2, 24, 24, heads, offsets, window)


def test_operators_are_sound() -> None:
    """By torch's own checks: schemas, fakes, autograd, under the compiler too."""
    q, k, v = random(12, 4, 8), random(12, 2, 8), random(12, 2, 8)
    offsets = torch.tensor([0, 5, 12, 12], dtype=torch.int32)
    for window in ((-1, 0), (3, 0)):
        torch.library.opcheck(varlen.attend, (q, k, v, offsets, offsets, 12, 12, *window))


@pytest.mark.parametrize(
    ("name", "major", "expected", "flash"),
    [
        ("auto", 9, ["CUDNN_ATTENTION", "FLASH_ATTENTION"], ["FA3", "FA4"]),
        ("auto", 10, ["CUDNN_ATTENTION", "FLASH_ATTENTION"], ["FA4"]),
        ("auto", 8, ["FLASH_ATTENTION", "CUDNN_ATTENTION"], []),
        ("cudnn", 9, ["CUDNN_ATTENTION"], ["FA3", "FA4"]),
        ("flash", 8, ["FLASH_ATTENTION"], []),
    ],
)
def test_which_kernels_are_set_by_the_card(
    name: Literal["auto", "cudnn", "flash"],
    major: int,
    expected: list[str],
    flash: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried: list[str] = []

    def not_installed(version: str) -> None:
        tried.append(version)
        raise ImportError

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", not_installed)
    with attention_kernels(name, torch.device("cuda")):
        order = [each.name for each in _cur_sdpa_kernel_backends(with_priority=True)]
    assert order[: len(expected)] == expected and (len(order) == len(expected) or name == "auto")
    assert tried == flash


def test_on_a_cpu_nothing_is_set() -> None:
    before = _cur_sdpa_kernel_backends(with_priority=True)
    with attention_kernels("cudnn", torch.device("cpu")):
        assert _cur_sdpa_kernel_backends(with_priority=True) == before
    kernel = kernel_in_use(PRESETS["debug"], torch.bfloat16, torch.device("cpu"), by_lengths=True)
    assert kernel == "flash_attention of cpu"
