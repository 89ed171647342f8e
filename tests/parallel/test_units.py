"""Recomputed units beside plain ones; whole runs are in test_lattice.py."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from titanlite.models.llama_spec import PRESETS, SPEC
from titanlite.parallel.units import Recomputed, recompute_units
from titanlite.plan.float8 import SETTINGS, decide_linears
from titanlite.precision.float8 import convert
from titanlite.recipe.sections import Float8, Recompute

CONFIG = PRESETS["debug"]
modes = pytest.mark.parametrize("mode", ["selective", "full"])


def plain_model() -> Any:
    torch.manual_seed(0)
    model = SPEC.build(CONFIG, torch.float64).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def loss_and_gradients(model: Any) -> list[Tensor]:
    tokens, labels = torch.randint(0, CONFIG.vocab_size, (2, 2, 16), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    loss = model(tokens, labels)
    loss.backward()
    return [loss.detach(), *(each.grad.clone() for each in model.parameters())]


@modes
def test_a_recomputed_model_is_the_same_to_its_outside(mode: Any) -> None:
    model = plain_model()
    model.layers["0"].register_buffer("seen", torch.zeros(1))
    model.layers["0"].register_buffer("scratch", torch.zeros(1), persistent=False)
    expected, state = loss_and_gradients(model), list(model.state_dict())
    names = [name for name, _ in model.named_modules()]
    recompute_units(model, SPEC, Recompute(mode=mode, every=2))
    assert [isinstance(layer, Recomputed) for layer in model.layers.values()] == [True, False, True, False]
    assert f"(0): Recomputed(\n      Block, {mode}\n      (attention_norm): RMSNorm()" in str(model)
    assert list(model.state_dict()) == state and [name for name, _ in model.named_modules()] == names
    runs = []
    model.layers["0"].attention_norm.register_forward_hook(lambda *_: runs.append(1))
    assert all(map(torch.equal, loss_and_gradients(model), expected))
    assert len(runs) == 2, "forward, and in the backward pass"


def test_what_is_replaced_within_it_runs() -> None:
    """As FSDP replaces parameters, and `to_empty` all of them: the module sees what is set on its wrapper."""
    model = plain_model()
    recompute_units(model, SPEC, Recompute(mode="full"))
    model.layers["0"].ffn = nn.Identity()
    model.layers["1"].ffn.down.weight = nn.Parameter(torch.zeros_like(model.layers["1"].ffn.down.weight))
    model.float()
    assert model.layers["1"].whole.ffn.down.weight is model.layers["1"].ffn.down.weight
    assert model.layers["0"].whole.ffn is model.layers["0"].ffn
    assert not model.layers["1"].whole.ffn(torch.ones(1, 1, CONFIG.dim)).any()


@modes
def test_units_compile_to_one_graph_for_all(mode: Any) -> None:
    model = plain_model()
    expected = loss_and_gradients(model)
    recompute_units(model, SPEC, Recompute(mode=mode))
    for layer in model.layers.values():
        layer.compile(dynamic=False, backend="aot_eager", fullgraph=True)
    torch._dynamo.reset()
    counters.clear()
    for found, true in zip(loss_and_gradients(model), expected, strict=True):
        torch.testing.assert_close(found, true)
    assert counters["stats"]["unique_graphs"] == 1


class Products(TorchDispatchMode):
    """Counts the matrix products and the attentions that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(operation.overloadpacket)
        self.seen["products" if name in ("aten.mm", "aten._scaled_mm") else name] += 1
        return operation(*args, **(kwargs or {}))


# By what is kept: products, then attentions, that a block of 7 products and one attention forms again. Nothing needs
# the last product's result, so the repetition ends before it. By the compiler too, which leaves out what else is idle.
AGAIN = {"attention": (6, 0), "every_second_product": (3, 0), "products": (0, 0)}
ATTENTION = "aten._scaled_dot_product_flash_attention_for_cpu"
keeps = pytest.mark.parametrize("keep", AGAIN)


@keeps
def test_what_is_kept_is_not_computed_again(keep: Any) -> None:
    """Of each block by itself, with several passes under way as in a pipeline, and the same bits."""
    tokens, labels = torch.randint(0, CONFIG.vocab_size, (2, 3, 2, 16))
    found = []
    for mode in ("none", "selective"):
        model = plain_model()
        recompute_units(model, SPEC, Recompute(mode=mode, keep=keep))
        losses = [model(*each) for each in zip(tokens, labels, strict=True)]
        with Products() as backward:
            for loss in losses[::-1]:
                loss.backward()
        found.append(([*losses, *(each.grad for each in model.parameters())], backward.seen))
    (expected, plain), (values, again) = found
    assert all(map(torch.equal, values, expected))
    passes = 3 * CONFIG.layers
    assert (again["products"] - plain["products"], again[ATTENTION]) == tuple(passes * each for each in AGAIN[keep])


@pytest.mark.parametrize(
    ("keep", "float8"),
    [
        *((keep, None) for keep in AGAIN),
        *(pytest.param("every_second_product", float8, marks=pytest.mark.slow) for float8 in ("tensorwise", "rowwise")),
    ],
)
def test_compiled_code_keeps_the_same(keep: Any, float8: Any) -> None:
    """One graph a pass for all blocks. With float8, also the largest values that `full` finds again: of six weights and
    of the three inputs that they are multiplied with.
    """
    found = []
    for mode in ("none", "selective", "full")[: 2 if float8 is None else 3]:
        model, graphs = plain_model().float(), list[Counter[str]]()
        if float8 is not None:
            linears = decide_linears(SPEC, CONFIG, Float8(enabled=True, recipe=float8, min_size=0))
            convert(model, linears, SETTINGS[float8], cache=False)
        recompute_units(model, SPEC, Recompute(mode=mode, keep=keep))

        def count(graph: Any, _: Any, graphs: Any = graphs) -> Any:
            kinds = {ATTENTION: "attentions", "aten.mm": "products", "aten._scaled_mm": "products", "aten.amax": "amax"}
            graphs.append(Counter(kinds.get(str(node.target).rpartition(".")[0], "") for node in graph.graph.nodes))
            return make_boxed_func(graph)

        backend = aot_autograd(fw_compiler=count, bw_compiler=count, partition_fn=min_cut_rematerialization_partition)
        for layer in model.layers.values():
            layer.compile(dynamic=False, backend=backend, fullgraph=True)
        torch._dynamo.reset()
        loss_and_gradients(model)
        assert len(graphs) == 2
        found.append(graphs[1])
    plain, again, *full = found
    assert (again["products"] - plain["products"], again["attentions"]) == AGAIN[keep]
    assert all(each["amax"] - again["amax"] == 9 for each in full)
