"""The benchmarks still run, and compare what they say they compare. No speed is asserted here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from titanlite.models.llama import Llama
from titanlite.models.llama_spec import LlamaConfig

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SMALL = {"dim": 16, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_dim": 24, "vocab_size": 272, "sequence_length": 8}


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def measure(script: str, out: Path, *words: str) -> tuple[str, dict[str, Any]]:
    """What a benchmark prints, and what it writes."""
    command = [sys.executable, str(BENCHMARKS / script), *words, "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(out.read_text())


@pytest.mark.slow
def test_contestants_and_two_checkouts_are_compared(tmp_path: Path) -> None:
    """The other checkout is a copy that leaves a file when it is imported."""
    for part in ("titanlite", "kernels", "benchmarks"):
        shutil.copytree(BENCHMARKS.parent / part, tmp_path / "other" / part)
    with (tmp_path / "other/titanlite/__init__.py").open("a") as module:
        module.write(f"\nopen({str(tmp_path / 'imported')!r}, 'w').close()\n")
    sizes = [word for key, value in SMALL.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    chosen = ["--batch", "2", "--precision", "bfloat16", "--contestants", "titanlite", "plain"]
    repeats = ["--rounds", "2", "--startups", "1", "--against", str(tmp_path / "other")]
    said, result = measure("single_device.py", tmp_path / "out.json", *sizes, *chosen, *repeats)
    assert "| titanlite | " in said and "NO CLAIM: 2 rounds" in said and (tmp_path / "imported").exists()
    contestants = {"titanlite", "plain", "before", "before-compiled"}
    turns, summary = result["bfloat16"]["turns"], result["bfloat16"]["summary"]
    assert {name: len(played) for name, played in turns.items()} == dict.fromkeys(contestants, 2)
    assert all(turn["tokens_per_second"] > 0 for played in turns.values() for turn in played)
    assert set(summary["titanlite"]["ratio"]) == {"before", "before-compiled"}
    assert {"titanlite", "before"} <= set(result["startup_seconds"])
    assert all(len(seconds) == 1 and seconds[0] > 0 for seconds in result["startup_seconds"].values())


@pytest.mark.slow
def test_the_data_benchmark_runs(tmp_path: Path) -> None:
    _, result = measure("data.py", tmp_path / "out.json", "--small")
    assert result["random_access"]["peak_bytes"] < 2**20 and result["start_up"]["documents"] == 3000


def test_the_plain_loop_has_our_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS / "contestants"))
    from plain_loop import PlainLlama
    from rules import NORM_EPS, ROPE_THETA, Settings

    plain = PlainLlama(Settings(**SMALL, batch=2, precision="float32", compile=False, corpus="", folder=""))
    sizes = {key: value for key, value in SMALL.items() if key != "sequence_length"}
    ours = Llama(LlamaConfig(**sizes, rope_theta=ROPE_THETA, norm_eps=NORM_EPS), torch.float32)
    ours.load_state_dict({name: tensor for name, tensor in plain.state_dict().items() if name not in ("cos", "sin")})
    tokens, labels = torch.randint(0, 272, (2, 2, 8))
    torch.testing.assert_close(ours(tokens), plain(tokens))
    torch.testing.assert_close(ours(tokens, labels) / labels.numel(), plain(tokens, labels))


def test_ratios_are_formed_within_a_round() -> None:
    from single_device import Turn, quartiles, summarise

    def turns(*rates: float) -> list[Turn]:
        return [Turn(rate, None, 0) for rate in rates]

    # Ours is twice as fast in every round, while the machine itself changes its speed from round to round.
    summary = summarise({"titanlite": turns(20, 2, 200), "trainer": turns(10, 1, 100)})
    assert summary["titanlite"]["ratio"] == {"trainer": (2, 2, 2)}
    assert quartiles([1, 2, 3, 4, 5]) == (2, 3, 4) and quartiles([7.0]) == (7, 7, 7)


def test_checkpoint_prints_tables_and_writes_what_it_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from checkpoint import main

    out = tmp_path / "out.json"
    assert (
        main(["--gib", "0.001", "--rounds", "1", "--patience", "0", "--folder", str(tmp_path), "--json", str(out)]) == 0
    )
    said, result = capsys.readouterr().out, json.loads(out.read_text())
    assert "| async save | " in said and "NO CLAIM: 1 rounds" in said and os.listdir(tmp_path) == ["out.json"]
    contestants = [list(of["seconds"]) for of in result["comparisons"].values()]
    reads = ["load", "load, no hashes", "dd to nowhere", "safetensors"]
    assert contestants == [["async save", "memcpy"], ["save", "dd", "safetensors"], reads, reads]
    assert all(
        len(seconds) == 1 and seconds[0] > 0
        for of in result["comparisons"].values()
        for seconds in of["seconds"].values()
    )
    assert 0.8e6 < result["bytes"] < 1.1e6 and result["memory_of_loading_bytes"].keys() == {"load", "safetensors"}


def test_the_contestants_move_the_same_bytes(tmp_path: Path) -> None:
    from checkpoint import Arena, summarise

    arena = Arena(10**5, torch.device("cpu"), tmp_path)
    for turn in (arena.load, arena.load_without_hashes, arena.safetensors_read, arena.memcpy()):
        for tensor in arena.twin.values():
            tensor.zero_()
        assert turn() > 0
        assert all(torch.equal(arena.twin[name], tensor) for name, tensor in arena.state.items())
    for turn in (arena.save, arena.async_save, arena.dd_write, arena.safetensors_write):
        assert turn() > 0
    assert load_file(tmp_path / "dd").keys() == load_file(tmp_path / "copy.safetensors").keys() == arena.state.keys()
    for kind in ("sync", "async"):
        files = list((tmp_path / kind / "step-00000001").glob("*.safetensors"))
        assert sum(tensor.nbytes for path in files for tensor in load_file(path).values()) == arena.nbytes
    summary = summarise({"ours": [2.0, 20.0, 200.0], "theirs": [1.0, 10.0, 100.0]}, 10**9)
    assert summary["ours"]["speed_over"] == {"theirs": (0.5, 0.5, 0.5)}


# ---- train_step.py ---------------------------------------------------------------------------------------------------

KERNELS = {
    "gemm": (
        "nvjet_tst_256x128_64x4_2x1_v_bz_coopA_NNT",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off_kernel__5x",
        "ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_tn",
        "void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<cutlass::gemm::kernel::GemmUniversal<"
        "cute::tuple<int, int, int, int>, cutlass::gemm::collective::CollectiveMma<cutlass::gemm::MainloopSm90>>>>",
        "cutlass_80_tensorop_s16816_f8_scaled_mm_tn",
        "void cublasLt::splitKreduce_kernel<32, 16, int, __nv_bfloat16, __nv_bfloat16, float>",
        "triton_tem_fused_mm_3",
    ),
    "attention": (
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4, cutlass::bfloat16_t>, true>",
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<128, 64, 128>>",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_cga1x1x1_kernel0_0",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_128x64x128_1x4x1_cga1x1x1_kernel0_0",
        "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::bfloat16_t>::Params)",
        "triton_tem_fused_flex_attention_0",
    ),
    "memory-bound": (
        "triton_poi_fused__scaled_mm_mul_silu_2",
        "triton_red_fused__scaled_dot_product_flash_attention_mean_rsqrt_1",
        "triton_per_fused_add_mul_sum_4",
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>, std::array<char*, 3ul>>",
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps<float, float>>>",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy<OpaqueType<2u>, unsigned int, 4, 64, 64>",
        "void at::native::(anonymous namespace)::cunn_SoftMaxForward<8, float, float>",
        "void at::native::(anonymous namespace)::indexSelectLargeIndex<float, long, unsigned int, 2, 2, -2, true>",
        "Memcpy DtoD (Device -> Device)",
        "Memset (Device)",
        "_forward",
        "_rotate",
    ),
    "optimizer": (
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous namespace)::"
        "FusedOptimizerTensorListMetadata<4>, at::native::(anonymous namespace)::FusedAdamMathFunctor<float, 4>>",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<TensorListMetadata<1>, LpNormFunctor>",
    ),
    "communication": (
        "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "ncclKernel_AllReduce_RING_LL_Sum_float",
    ),
    "other": ("void somebody::mystery<float>",),
}


def test_kernels_are_known_by_their_names() -> None:
    from breakdown import CLASSES, kernel_class

    found = {kind: tuple(name for name in names if kernel_class(name) == kind) for kind, names in KERNELS.items()}
    assert found == KERNELS and set(KERNELS) == set(CLASSES)


def event(category: str, name: str, start: float, duration: float, thread: int = 1) -> dict[str, object]:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration, "tid": thread}


def test_a_step_on_a_gpu_is_the_sum_of_its_kernels() -> None:
    from breakdown import OPTIMIZER, breakdown

    events = [
        event("cpu_op", "aten::mm", 0, 1000),
        event("gpu_user_annotation", "ProfilerStep#1", 0, 1000),
        event("kernel", "nvjet_tst_128x256", 100, 300),
        event("kernel", "ncclDevKernel_AllGather_RING_LL", 300, 200, thread=2),  # 100 of it beside the product
        event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 600, 50),
        event("gpu_user_annotation", OPTIMIZER, 700, 200),
        event("kernel", "nvjet_tst_64x64", 700, 80),  # a product of Muon's
        event("kernel", "mystery", 900, 25),
    ]
    found = breakdown({"traceEvents": [*events, {"ph": "M", "name": "process_name"}]}, gpu=True)
    microseconds = {kind: round(1e6 * seconds) for kind, seconds in found.seconds.items() if seconds}
    expected = {"gemm": 300, "communication": 200, "memory-bound": 50, "optimizer": 80, "other": 25}
    assert microseconds == expected
    assert found.busy == pytest.approx((400 + 50 + 80 + 25) / 1e6) and found.unknown == pytest.approx(
        {"mystery": 25e-6}
    )


def test_a_step_on_a_cpu_is_the_sum_of_what_operators_do_themselves() -> None:
    from breakdown import OPTIMIZER, breakdown

    events = [
        event("user_annotation", "ProfilerStep#1", 0, 1000),
        event("cpu_op", "aten::linear", 100, 200),
        event("cpu_op", "aten::t", 100, 10),  # begins with what it is in
        event("cpu_op", "aten::addmm", 120, 150),
        event("cpu_op", "MulBackward0", 400, 100),
        event("cpu_op", "aten::mul", 410, 60),
        event("user_annotation", OPTIMIZER, 600, 100),
        event("cpu_op", "aten::mm", 620, 50),
        event("cpu_op", "aten::add", 400, 30, thread=2),
    ]
    found = breakdown({"traceEvents": events}, gpu=False)
    microseconds = {kind: round(1e6 * seconds) for kind, seconds in found.seconds.items() if seconds}
    assert microseconds == {"gemm": 200, "memory-bound": 60 + 30, "other": 40, "optimizer": 100}
    assert found.busy == pytest.approx(400e-6)


SMALLEST = [
    "--model.preset=debug",
    "--model.layers=1",
    "--training.sequence_length=16",
    "--warmup",
    "1",
    "--steps",
    "1",
]


def test_a_step_is_measured_and_broken_down(capsys: pytest.CaptureFixture[str]) -> None:
    from train_step import main

    assert main([*SMALLEST, "--breakdown"]) == 0
    said, table = capsys.readouterr()
    result = json.loads(said.splitlines()[-1])
    assert result["tokens_per_second"] > 0 and result["mfu"] is None and result["memory_peak_gib"] > 0
    classes, step = result["breakdown"]["classes"], result["breakdown"]["step_seconds"]
    worked = {"gemm", "attention", "memory-bound", "optimizer"}
    assert all(classes[kind]["seconds"] > 0 for kind in worked) and classes["communication"]["seconds"] == 0
    # One thread works, so the parts are the whole.
    assert sum(of["seconds"] for of in classes.values()) == pytest.approx(step, rel=1e-2)
    assert all(classes[kind]["share_of_matmul"] > 0 for kind in ("gemm", "attention"))
    assert "| gemm | " in table and "| idle | " in table


# ---- commands one after the other ------------------------------------------------------------------------------------


def test_parts_end_and_say_how() -> None:
    from parts import Part, run

    def outcome(script: str, allowed: float = 60, left: float = 60) -> dict[str, object]:
        result: dict[str, object] = run(Part("it", ["bash", "-c", script], allowed, {"GIVEN": "thing"}), left)
        return result

    passed = outcome('echo words; echo "{\\"value\\": \\"$GIVEN\\"}"; echo "{1: 2}"; echo "{cut o"')
    assert passed["outcome"] == "passed" and passed["result"] == {"value": "thing"} and "output" not in passed
    failed = outcome("echo why >&2; exit 3")
    assert failed["outcome"] == "failed with 3" and failed["output"] == "why\n"
    # What it started, and what holds its streams open, ends with it.
    slow = outcome("echo begun; sleep 1000 & sleep 1000", allowed=0.2)
    assert slow["outcome"] == "over its 0 s" and slow["output"] == "begun\n" and float(str(slow["seconds"])) < 60
    assert outcome("sleep 1000", left=0.1)["outcome"] == "cut off by the deadline after 0 s"


def test_the_matrix_compares_with_each_models_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import matrix
    from parts import Part

    def run(part: Part) -> dict[str, object]:
        if "full" in part.name:
            return {"name": part.name, "outcome": "failed with 1", "seconds": 1.0}
        got = {"tokens_per_second": 50.0, "mfu": None, "memory_peak_gib": 3.0, "first_step_seconds": 9.0}
        if "eager" in part.name:
            got |= {"tokens_per_second": 20.0, "mfu": 0.5, "memory_peak_gib": 2.0}
        return {"name": part.name, "outcome": "passed", "seconds": 1.0, "result": got}

    monkeypatch.setattr(matrix, "run", run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert matrix.run_matrix(False, tmp_path, []) == 2, "no GPU"
    assert matrix.run_matrix(True, tmp_path, []) == 1
    said = capsys.readouterr().out
    assert "| debug | eager | 20 | 1.00 | 50.0% | 2.0 | 1.00 | 9.0 |" in said
    assert "| debug | compiled | 50 | 2.50 |  | 3.0 | 1.50 | 9.0 |" in said
    assert "| debug | compiled, full recompute | failed with 1 |" in said
    (written,) = tmp_path.glob("train_step-*.json")
    ways = [row["way"] for row in json.loads(written.read_text())["steps"]]
    assert ways == [way for way in matrix.WAYS if "Triton" not in way] and written.with_suffix(".md").exists()


def test_every_step_of_the_matrix_is_a_recipe() -> None:
    from matrix import SMALL, STEPS
    from train_step import BASE

    from titanlite.cli.check import check_recipe
    from titanlite.recipe.load import load_recipe

    assert 12 <= len(STEPS) <= 15
    for step in (*STEPS, *SMALL):
        overrides = [word for word in step.part(1).command if word.startswith("--") and "." in word]
        check_recipe(load_recipe(BASE, overrides), 1)


def kernel_row(name: str, **found: object) -> dict[str, object]:
    return {"operation": name, "model": "8B", "share_of_copy": None, "share_of_eager_peak": None, **found}


def test_the_gpus_check_judges_what_was_measured() -> None:
    from gpu_check import BFLOAT16, FLOAT8, targets

    def passed(name: str, **result: object) -> dict[str, object]:
        return {"name": name, "outcome": "passed", "result": result}

    rows = [
        kernel_row("rope.forward", share_of_copy=0.9, compiled=0.98, liger="TypeError"),
        kernel_row("rope.backward", share_of_copy=0.84, compiled=1.2, liger=1.0),
        kernel_row("linear_cross_entropy.both", share_of_eager_peak=0.144),
    ]
    results = [
        passed("kernels against a copy and others", rows=rows),
        passed(BFLOAT16.name, mfu=0.5, tokens_per_second=100.0),
        passed(FLOAT8.name, mfu=0.6, tokens_per_second=124.0),
        passed("a few steps in float32", loss=4.0),
        passed("a few steps in bfloat16", loss=4.01),
        passed("a few steps in float8 rowwise", loss=4.1),
        {"name": "a few steps in float8 tensorwise", "outcome": "failed with 1"},
    ]
    assert [(measured, met) for _, measured, met in targets(results)] == [
        *(("0.25%", True), ("2.50%", False)),
        *(("90.0%", True), ("0.98x", False)),
        *(("84.0%", False), ("1.20x", True), ("1.00x", True)),
        *(("14.4%", True), ("50.0%", True), ("1.24x", False)),
    ]
    assert targets([]) == []


def test_the_deadline_leaves_out_what_matters_least(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import gpu_check
    from parts import Part

    def parts(small: bool, scratch: str) -> list[Part]:
        return [Part("first", ["true"], 20), Part("second", ["false"], 20), Part("third", ["true"], 20)]

    def run(part: Part, left: float) -> dict[str, object]:
        outcome = "failed with 1" if part.command == ["false"] else "passed"
        return {"name": part.name, "outcome": outcome, "seconds": left}

    clock = iter([0, 0, 0, 6, 6, 30, 30])
    monkeypatch.setattr(gpu_check, "parts", parts)
    monkeypatch.setattr(gpu_check, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(gpu_check, "run", run)
    monkeypatch.setattr(sys, "argv", ["gpu_check", str(tmp_path), "--small", "--deadline", "40"])
    assert gpu_check.main() == 1
    said = capsys.readouterr().out
    assert "| first | passed | 40" in said and "| second | failed with 1 | 34" in said
    assert "| third | left out: the deadline | 0.0 |" in said
    (written,) = tmp_path.glob("gpu_check-*.json")
    assert len(json.loads(written.read_text())["parts"]) == 3 and written.with_suffix(".md").read_text() in said
