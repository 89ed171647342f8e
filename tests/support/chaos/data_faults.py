"""Texts that vanish or change under a run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from support.bpe import saved, word_pieces
from support.chaos.fault import EQUAL, Fault, Outcome
from support.chaos.sandbox import EVERY, STEPS, Sandbox


def lost_while_running(what: str, act: Callable[[Path], None]) -> Fault:
    """A corpus is read whole when a run starts: there is nothing to lose, and nothing to tell."""

    def run(box: Sandbox) -> Outcome:
        text = (box.folder / "corpus.txt").read_text()
        job = box.paused()
        act(box.folder / "corpus.txt")
        box.go()
        job.done()
        (box.folder / "corpus.txt").write_text(text)
        box.require_whole()
        return Outcome(0, EQUAL, "(nothing: texts are read whole when a run starts)")

    return Fault(25, f"text {what} while a run trains on it", "rm, truncate", run)


def lost_before_a_restart(what: str, act: Callable[[Path], None], said: str) -> Fault:
    """Refused by name, with every checkpoint where it was; put back, the run goes on."""

    def run(box: Sandbox) -> Outcome:
        box.prepared()
        text = (box.folder / "corpus.txt").read_text()
        act(box.folder / "corpus.txt")
        refusal = box.start().ended(2).said
        (box.folder / "corpus.txt").write_text(text)
        box.train()
        assert box.resumed() == 3 * EVERY
        box.require_whole()
        return Outcome(0, EQUAL, box.message(refusal, said))

    return Fault(25, f"text {what} before a run goes on", "rm, truncate; then put back", run)


def _halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _prepared_tokens(box: Sandbox) -> Path:
    """The corpus as a token file, which the recipe then names; its `.bin`."""
    box.command("data", "prepare", "corpus.txt", "--out", "tokens")
    recipe = (box.folder / "recipe.toml").read_text()
    (box.folder / "recipe.toml").write_text(recipe.replace("corpus.txt", "tokens"))
    return box.folder / "tokens.bin"


def tokens_cut(ranks: int) -> Callable[[Sandbox], Outcome]:
    """Issue 14, item 14: no SIGBUS, but a sentence and a saved state; put back, the run goes on."""

    def run(box: Sandbox) -> Outcome:
        path = _prepared_tokens(box)
        data = path.read_bytes()
        job = box.paused(ranks=ranks, on=list(range(ranks)))
        os.truncate(path, 100)
        box.go()
        codes = set(job.wait())
        assert codes == {2} and "Traceback" not in job.said, (codes, job.said)
        path.write_bytes(data)
        return Outcome(box.resume_whole(ranks=ranks), EQUAL, box.message(job.said, "tokens.bin: cut short while"))

    return run


def bit_flipped(box: Sandbox) -> Outcome:
    """Issue 14, item 10: found beside the training of the first start, remembered, and mended by the file put back."""
    path = _prepared_tokens(box)
    data = path.read_bytes()
    path.write_bytes(data[:1_000] + bytes([data[1_000] ^ 1]) + data[1_001:])
    said = box.start().ended(2).said
    assert box.steps() == [box.step()], "the state is saved"
    again = box.start().ended(2).said
    assert "The state after" in said and "The state after" not in again and len(box.curve()) == box.step()
    path.write_bytes(data)
    box.train()
    assert box.step() == STEPS
    return Outcome(0, "trained on damaged data up to there", box.message(said, "tokens.bin: damaged"))


def worker_killed(box: Sandbox) -> Outcome:
    """Issue 14, item 15: saved, a sentence, and no crash record: torchrun starts it again as often as it likes."""
    job = box.start("--data.workers=1", ranks=2, fault="worker_killed", step=EVERY + 3, on=[1])
    assert sorted(job.wait()) == [2, 75] and "Traceback" not in job.said, job.said
    assert not list(box.run_folder().glob("logs/crashes/*"))
    reached = box.step()
    box.train("--data.workers=1", ranks=2)
    box.require_whole(ranks=2)
    return Outcome(reached - box.resumed(), EQUAL, box.message(job.children[1].said, "a data worker ended"))


def tokenizer_raises(box: Sandbox) -> Outcome:
    """Issue 14, item 16: a document beyond a vocabulary whose unknown token is missing; with it, the run begins."""
    path = saved(word_pieces(), box.folder / "words")
    sound = json.loads(path.read_text())
    path.write_text(json.dumps({**sound, "model": {**sound["model"], "unk_token": "[NONE]"}}))
    lines = [{"text": "a name of the token " * (1 + n % 5)} for n in range(300)] + [{"text": "日"}]
    (box.folder / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["--data.corpus=texts.jsonl", "--data.tokenizer=words", "--data.separator=[SEP]", "--model.vocab_size=272"]
    said = box.start(*words).ended(2).said
    assert "Traceback" not in said and box.rows() == []
    path.write_text(json.dumps(sound))
    box.train(*words)
    assert box.step() == STEPS
    return Outcome(None, "nothing trained", box.message(said, "texts.jsonl:301: "))


FAULTS = [
    lost_while_running("removed", Path.unlink),
    lost_while_running("cut", _halve),
    lost_before_a_restart("removed", Path.unlink, "corpus.txt"),
    lost_before_a_restart("cut", _halve, "is not what it was"),
    Fault(36, "token file cut while a run trains on it", "truncate", tokens_cut(1)),
    Fault(36, "token file cut while two ranks train on it", "truncate", tokens_cut(2), slow=True),
    Fault(37, "bit flipped in a token file", "before the first start", bit_flipped),
    Fault(38, "data worker of one rank of two killed", "SIGKILL", worker_killed),
    Fault(39, "document that a tokenizer's library fails on", "no unknown token", tokenizer_raises),
]
