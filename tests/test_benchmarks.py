"""The benchmarks still run, and compare what they say they compare. No speed is asserted here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from titanlite.models.llama import Llama
from titanlite.models.llama_spec import LlamaConfig

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SMALL = {"dim": 16, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_dim": 24, "vocab_size": 272, "sequence_length": 8}


@pytest.mark.slow
def test_single_device_prints_tables_and_writes_what_it_measured(tmp_path: Path) -> None:
    sizes = [word for key, value in SMALL.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    out = tmp_path / "out.json"
    chosen = ["--batch", "2", "--precision", "bfloat16", "--contestants", "titanlite", "plain"]
    repeats = ["--rounds", "2", "--startups", "1", "--json", str(out)]
    command = [sys.executable, str(BENCHMARKS / "single_device.py"), *sizes, *chosen, *repeats]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "| titanlite | " in done.stdout and "NO CLAIM: 2 rounds" in done.stdout
    result = json.loads(out.read_text())
    turns = result["bfloat16"]["turns"]
    assert [len(turns[name]) for name in ("titanlite", "plain")] == [2, 2]
    assert all(turn["tokens_per_second"] > 0 for played in turns.values() for turn in played)
    assert all(len(seconds) == 1 and seconds[0] > 0 for seconds in result["startup_seconds"].values())


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


def test_ratios_are_formed_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from single_device import Turn, quartiles, summarise

    def turns(*rates: float) -> list[Turn]:
        return [Turn(rate, None, 0) for rate in rates]

    # Ours is twice as fast in every round, while the machine itself changes its speed from round to round.
    summary = summarise({"titanlite": turns(20, 2, 200), "trainer": turns(10, 1, 100)})
    assert summary["titanlite"]["ratio"] == {"trainer": (2, 2, 2)}
    assert quartiles([1, 2, 3, 4, 5]) == (2, 3, 4) and quartiles([7.0]) == (7, 7, 7)


def test_checkpoint_prints_tables_and_writes_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
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


def test_the_contestants_move_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
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
