"""The model against Hugging Face's Llama, and its own paths against each other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.whole import shards_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig as HuggingFaceConfig
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM

from titanlite.models.init import draw_rows, initialise
from titanlite.models.layers import Embedding
from titanlite.models.llama import Llama
from titanlite.models.llama_spec import (
    PRESETS,
    SPEC,
    LlamaConfig,
    flops_per_token,
    initial_std,
    model_config,
    to_huggingface,
)
from titanlite.recipe.sections import Model, RopeScaling

pytestmark = pytest.mark.quick

ODD = LlamaConfig(dim=96, layers=5, heads=6, kv_heads=3, ffn_dim=130, vocab_size=257)
SHAPES = {
    "odd vocab, 3 kv heads": ODD,
    "2 kv heads, tied, scaled rope": replace(
        ODD,
        kv_heads=2,
        vocab_size=131,
        tie_embeddings=True,
        rope_scaling=RopeScaling(factor=8.0, original_context=32),
    ),
    "no grouping, large eps, small theta": replace(ODD, layers=1, kv_heads=6, norm_eps=1e-2, rope_theta=100.0),
    "one kv head": replace(ODD, dim=60, heads=6, kv_heads=1, ffn_dim=7),
}


def build(config: LlamaConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> Llama:
    model = SPEC.build(config, dtype)
    model.to(torch.promote_types(dtype, torch.float32))
    initialise(shards_of(model).table, lambda name: initial_std(config, name), seed)
    return model


def huggingface_config(config: LlamaConfig) -> HuggingFaceConfig:
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": config.rope_scaling.factor,
            "low_freq_factor": config.rope_scaling.low_freq_factor,
            "high_freq_factor": config.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": config.rope_scaling.original_context,
        }
    return HuggingFaceConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        intermediate_size=config.ffn_dim,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tie_embeddings,
        rope_parameters=rope,
        max_position_embeddings=2048,
        attn_implementation="eager",
    )


def huggingface_twin(model: Llama) -> LlamaForCausalLM:
    twin = LlamaForCausalLM(huggingface_config(model.config)).to(model.head.weight.dtype)
    # Random norms too: with ones, a norm that forgot its weight would go unseen.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    state = {to_huggingface(name): parameter.detach().clone() for name, parameter in model.named_parameters()}
    missing, unexpected = twin.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= ({"lm_head.weight"} if model.config.tie_embeddings else set())
    return twin


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())
def test_logits_loss_and_gradients_equal_hugging_face(config: LlamaConfig) -> None:
    model = build(config)
    twin = huggingface_twin(model)
    tokens = torch.randint(0, config.vocab_size, (3, 51))
    labels = torch.randint(0, config.vocab_size, (3, 51))
    labels[0, 7:20] = -100

    logits = model(tokens)
    torch.testing.assert_close(logits, twin(tokens).logits, rtol=2e-5, atol=2e-5)

    model(tokens, labels).backward()
    expected = torch.nn.functional.cross_entropy(
        twin(tokens).logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
    )
    expected.backward()
    theirs = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        reference = theirs[to_huggingface(name)].grad
        assert reference is not None and parameter.grad is not None
        difference = (parameter.grad - reference).norm() / reference.norm()
        assert difference < 2e-5, f"{name}: gradients differ by {difference:.1e}"


def test_a_window_is_that_of_hugging_faces_mistral() -> None:
    model = build(
        replace(SHAPES["2 kv heads, tied, scaled rope"], rope_scaling=None, tie_embeddings=False, window=(7,))
    )
    fields = huggingface_config(model.config).to_dict() | {"sliding_window": 7, "attn_implementation": "eager"}
    fields = {
        key: value for key, value in fields.items() if key not in ("model_type", "architectures", "_name_or_path")
    }
    twin = MistralForCausalLM(MistralConfig(**fields))
    twin.load_state_dict({to_huggingface(name): each.detach().clone() for name, each in model.named_parameters()})
    tokens = torch.randint(0, 131, (2, 40))
    logits = model(tokens)
    torch.testing.assert_close(logits, twin(tokens).logits, rtol=2e-5, atol=2e-5)
    assert (logits - build(replace(model.config, window=()))(tokens)).abs().max() > 1e-2, "the window must matter"


@pytest.mark.parametrize("preset", [name for name in PRESETS if name.startswith("llama3")])
def test_published_presets_have_hugging_faces_parameter_counts(preset: str) -> None:
    with torch.device("meta"):
        twin = LlamaForCausalLM(huggingface_config(PRESETS[preset]))
        ours = SPEC.build(PRESETS[preset], torch.bfloat16)
    assert SPEC.parameter_count(PRESETS[preset]) == twin.num_parameters() == sum(p.numel() for p in ours.parameters())


@pytest.mark.parametrize("preset", PRESETS)
def test_counts_are_those_of_the_module(preset: str) -> None:
    config = PRESETS[preset]
    with torch.device("meta"):
        model = SPEC.build(config, torch.float32)
    assert SPEC.parameter_count(config) == sum(p.numel() for p in model.parameters())
    blocks = model.layers.named_parameters()
    assert all(SPEC.is_block_matrix(f"layers.{name}") == (parameter.dim() == 2) for name, parameter in blocks)
    named = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    assert list(SPEC.shapes(config).items()) == named


def test_flops_are_those_that_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    config = replace(ODD, qk_norm=False)
    model = build(config)
    tokens = torch.randint(0, config.vocab_size, (2, 64))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens, tokens).backward()
    ours = flops_per_token(config, 64) * tokens.numel()
    # The formula counts vectors as if they were multiplied, by custom; torch counts matrix products alone.
    vectors = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 1)
    assert counter.get_total_flops() == ours - 6 * tokens.numel() * vectors


def test_windows_count_for_what_they_hold() -> None:
    """Operations of attention are those of the keys that are seen, of each layer, and pieces have their own."""
    config = replace(ODD, layers=4, window=(8, 0))
    each = 12 * config.heads * config.head_dim
    assert flops_per_token(config, 64) - flops_per_token(config, 0) == each * 2 * (8 + 64)
    assert flops_per_token(config, 4) - flops_per_token(config, 0) == each * 4 * 4
    near, far, *others = (piece.flops for piece in SPEC.pieces(config, 64)[1:5])
    assert far - near == each * (64 - 8) and others == [near, far]


@pytest.mark.parametrize("window", [(), (7,), (0, 3)])
def test_cached_generation_gives_the_logits_of_one_pass(window: tuple[int, ...]) -> None:
    model = build(replace(SHAPES["2 kv heads, tied, scaled rope"], window=window))
    tokens = torch.randint(0, 131, (2, 40))
    with torch.no_grad():
        whole = model(tokens)
        caches = model.new_caches(batch=2, capacity=40)
        pieces = [model(tokens[:, :17], caches=caches)]
        pieces += [model(tokens[:, i : i + 1], caches=caches) for i in range(17, 25)]
        pieces += [model(tokens[:, 25:40], caches=caches)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-5, atol=1e-5)


def test_document_mask_equals_each_document_alone() -> None:
    model = build(replace(ODD, qk_norm=True))
    first, second = torch.randint(0, 257, (1, 13)), torch.randint(0, 257, (1, 21))
    packed = torch.cat((first, second), dim=1)
    positions = torch.cat((torch.arange(13), torch.arange(21)))[None]
    documents = torch.tensor([0, 13, 34, 34], dtype=torch.int32)
    with torch.no_grad():
        together = model(packed, positions=positions, documents=documents)
        torch.testing.assert_close(together[:, :13], model(first), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(together[:, 13:], model(second), rtol=1e-5, atol=1e-5)


class FloatsSeen(TorchDispatchMode):
    """Collects the float dtypes of all that torch computes inside, backward passes included."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        floats = (t for t in tree_leaves(results) if isinstance(t, torch.Tensor) and t.is_floating_point())
        self.dtypes.update(tensor.dtype for tensor in floats)
        return results


@pytest.mark.parametrize("masked", [False, True])
def test_float64_runs_in_float64_throughout(masked: bool) -> None:
    """No operation on the way, forward or backward, has a narrower result: proofs in float64 would not see past it."""
    model = build(replace(SHAPES["2 kv heads, tied, scaled rope"], qk_norm=True), torch.float64)
    tokens = torch.randint(0, 131, (2, 32))
    documents = torch.tensor([0, 10, 20, 32, 45, 64], dtype=torch.int32) if masked else None
    with FloatsSeen() as seen:
        loss = model(tokens, tokens, documents=documents)
        loss.backward()
    assert seen.dtypes == {torch.float64}
    with FloatsSeen() as seen:
        build(ODD, torch.bfloat16)(tokens)
    assert {torch.bfloat16, torch.float32} <= seen.dtypes, "the witness itself must be able to see them"


def test_bfloat16_compute_keeps_float32_weights_and_gradients() -> None:
    model = build(ODD, torch.bfloat16)
    tokens = torch.randint(0, 257, (2, 16))
    assert model(tokens).dtype == torch.bfloat16
    loss = model(tokens, tokens)
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)
    exact = build(ODD)(tokens, tokens)
    assert abs((loss / exact).item() - 1) < 2e-3


def test_a_bfloat16_table_sums_the_gradients_of_a_frequent_token_wider() -> None:
    """As under FSDP, where weights travel in the compute dtype: 20,000 equal terms are more than bfloat16 can add."""
    table = Embedding(4, 2, torch.bfloat16).to(torch.bfloat16)
    table(torch.ones(20_000, dtype=torch.int64)).sum().backward()
    assert table.weight.grad is not None and table.weight.grad.dtype == torch.bfloat16
    assert table.weight.grad[1].tolist() == pytest.approx([20_000] * 2, rel=2**-8)


def test_recipe_keys_lie_over_the_preset() -> None:
    config = model_config(Model(preset="llama3-8b", layers=2, tie_embeddings=True))
    assert config == replace(PRESETS["llama3-8b"], layers=2, tie_embeddings=True)


def test_initial_weights_depend_on_seed_name_and_index_alone() -> None:
    shape = (3000, 700)  # several blocks
    whole = draw_rows("layers.0.ffn.up.weight", shape, 0, 3000, 0.02, seed=5)
    pieces = [
        draw_rows("layers.0.ffn.up.weight", shape, a, b, 0.02, seed=5) for a, b in ((0, 1), (1, 1999), (1999, 3000))
    ]
    assert torch.equal(torch.cat(pieces), whole)
    assert not torch.equal(draw_rows("layers.1.ffn.up.weight", shape, 0, 3000, 0.02, seed=5), whole)
    assert not torch.equal(draw_rows("layers.0.ffn.up.weight", shape, 0, 3000, 0.02, seed=6), whole)
    rows = whole.flatten(1)
    assert abs(float(rows.mean())) < 1e-4 and abs(float(rows.std()) - 0.02) < 1e-4
    assert len({tuple(row[:4].tolist()) for row in rows}) == 3000, "no block repeats another"


def test_depth_scaled_init_narrows_what_writes_into_the_residual_stream() -> None:
    assert initial_std(ODD, "layers.0.ffn.down.weight") == pytest.approx(0.02 / 10**0.5)
    assert initial_std(ODD, "layers.4.attention.wo.weight") == pytest.approx(0.02 / 10**0.5)
    assert initial_std(replace(ODD, depth_scaled_init=False), "layers.0.ffn.down.weight") == 0.02
    assert initial_std(ODD, "layers.0.attention.wq.weight") == 0.02
    assert initial_std(ODD, "layers.0.ffn_norm.weight") is None
