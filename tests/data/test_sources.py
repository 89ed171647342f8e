"""Several sources, mixed by weights over stages, from texts and token files; validation sets by name."""

from __future__ import annotations

import os
import pickle
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from titanlite.cli.data import main as data_command
from titanlite.corpus.verification import Verification
from titanlite.data.sources import Source
from titanlite.data.splits import DataSplits, open_data, require_samples
from titanlite.data.survey import find_shared_texts
from titanlite.errors import DataError
from titanlite.recipe.sections import Data

LENGTH = 16


def prepare(*words: str) -> None:
    assert data_command(["prepare", *words]) == 0


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three folders of documents that say which they are of: `a a a ...`; 300, 200 and 100 windows or so."""
    root = tmp_path_factory.mktemp("texts")
    for name, documents in (("a", 150), ("b", 100), ("c", 50)):
        (root / name).mkdir()
        for number in range(documents):
            (root / name / f"{number}.txt").write_text(name * 31)
    return root


@pytest.fixture(scope="module")
def prepared(texts: Path) -> Path:
    """The second folder as a token file, with a held-out part."""
    prepare(str(texts / "b"), "--out", str(texts / "tokens" / "b"), "--held-out", "10")
    return texts / "tokens" / "b"


def opened(texts: Path, validated: bool = True, **data: Any) -> DataSplits:
    sources = data.pop("sources", [{"name": "a"}, {"name": "b"}, {"name": "c"}])
    sources = [{"path": str(texts / each["name"]), **each} for each in sources]
    section = Data.model_validate({"sources": sources, **data})
    return open_data(section, LENGTH, 7, validated=validated)


def origins(splits: DataSplits, first: int, samples: int) -> Counter[str]:
    """How many samples are of each folder, by what they say."""
    found: Counter[str] = Counter()
    for number in range(first, first + samples):
        (said,) = set(splits.tokenizer.decode(splits.train.sample(number)).decode())
        found[said] += 1
    return found


def test_samples_come_by_weight(texts: Path, prepared: Path) -> None:
    sources = [
        {"name": "a", "weight": 1.0},
        {"name": "b", "weight": 2.0, "path": str(prepared)},
        {"name": "c", "weight": 5.0},
    ]
    splits = opened(texts, sources=sources)
    assert origins(splits, 0, 1000) == {"a": 125, "b": 250, "c": 625}
    assert origins(splits, 333, 1000) == {"a": 125, "b": 250, "c": 625}


def test_without_weights_each_window_is_as_likely(texts: Path) -> None:
    splits = opened(texts)
    sizes = {each.name: each.windows for each in splits.train.sources}
    total = sum(sizes.values())
    for name, count in origins(splits, 0, 1000).items():
        assert abs(count - 1000 * sizes[name] / total) <= 1


def test_a_source_reads_each_window_once_an_epoch_in_an_order_of_its_own(texts: Path) -> None:
    splits = opened(texts)
    places: dict[str, list[int]] = {}
    for number in range(2 * splits.train.windows):
        source, window = splits.train.place(number)
        places.setdefault(source.name, []).append(window)
    for source in splits.train.sources:
        assert sorted(places[source.name][: source.windows]) == list(range(source.windows))
    assert places["a"][:50] != places["b"][:50]


def test_another_source_changes_no_ones_order(texts: Path) -> None:
    def order(splits: DataSplits) -> list[int]:
        places = (splits.train.place(number) for number in range(900))
        return [window for source, window in places if source.name == "b"]

    alone = order(opened(texts, sources=[{"name": "b"}]))
    among = order(opened(texts))
    assert among == alone[: len(among)]


def test_stages(texts: Path) -> None:
    stages = [{"until": 500 * LENGTH, "weights": {"a": 1.0}}, {"weights": {"b": 0.25, "c": 0.75}}]
    splits = opened(texts, stages=stages)
    assert origins(splits, 0, 500) == {"a": 500}
    assert origins(splits, 500, 1000) == {"b": 250, "c": 750}


def test_epochs_and_tokens_limit_a_source(texts: Path) -> None:
    sources = [
        {"name": "a", "weight": 1.0},
        {"name": "b", "weight": 1.0, "epochs": 0.5},
        {"name": "c", "weight": 1.0, "tokens": 20 * LENGTH},
    ]
    splits = opened(texts, sources=sources)
    windows = {each.name: each.windows for each in splits.train.sources}
    assert origins(splits, 0, 1000) == {"a": 1000 - windows["b"] // 2 - 20, "b": windows["b"] // 2, "c": 20}
    said = require_samples(splits.train, 1000)
    assert [line.split()[1] for line in said] == ["a", "b", "c"]
    assert said[1].endswith("will be read 0.50 times")


def test_too_little_data_is_an_error_before_the_run(texts: Path) -> None:
    splits = opened(texts, sources=[{"name": "a", "epochs": 2.0}])
    enough = 2 * splits.train.windows
    assert require_samples(splits.train, enough) == [
        f"source a ({splits.train.tokens / 1000:.2f}K tokens) will be read 2.00 times"
    ]
    with pytest.raises(DataError, match=r"data\.sources: .*training\.tokens"):
        require_samples(splits.train, enough + 1)
    with pytest.raises(DataError, match="used up"):
        splits.train.sample(enough)


def test_one_corpus_needs_no_words_unless_it_is_read_again(texts: Path) -> None:
    splits = open_data(Data(corpus=str(texts / "a")), LENGTH, 0)
    assert require_samples(splits.train, splits.train.windows) == []
    assert require_samples(splits.train, 3 * splits.train.windows)[0].endswith("read 3.00 times")


def documents(source: Source) -> int:
    return sum(len(stream.document_ends()) for stream in source.streams)


def test_validation_sets_are_the_held_out_parts_or_those_named(texts: Path, prepared: Path) -> None:
    sources = [{"name": "a"}, {"name": "b", "path": str(prepared)}]
    splits = opened(texts, sources=sources)
    assert [each.name for each in splits.validation] == ["a", "b"]
    held = splits.validation[1]
    assert 0 < documents(held) < 30
    assert documents(held) + documents(splits.train.sources[1]) == 100
    named = [{"name": "all-of-c", "path": str(texts / "c")}, {"name": "held", "path": f"{prepared}-validation"}]
    sets = opened(texts, sources=sources, validation=named).validation
    assert [(each.name, documents(each)) for each in sets] == [("all-of-c", 50), ("held", documents(held))]
    assert opened(texts, sources=sources, validated=False).validation == ()


def test_nothing_to_validate_on(texts: Path) -> None:
    prepare(str(texts / "c"), "--out", str(texts / "whole"))
    sources = [{"name": "c", "path": str(texts / "whole")}]
    assert opened(texts, sources=sources, validated=False).train.windows
    with pytest.raises(DataError, match=r"validation\.every_steps: .*--held-out"):
        opened(texts, sources=sources)


def test_token_files_by_a_glob_are_one_source(texts: Path, tmp_path: Path) -> None:
    for name in ("a", "c"):
        prepare(str(texts / name), "--out", str(tmp_path / name), "--held-out", "20")
    splits = opened(texts, sources=[{"name": "both", "path": str(tmp_path / "*")}])
    (source,) = splits.train.sources
    assert source.windows == sum((len(stream.tokens) - 1) // LENGTH for stream in source.streams)
    seen = np.concatenate([source.window(index)[:-1] for index in range(source.windows)])
    kept = [stream.tokens[: (len(stream.tokens) - 1) // LENGTH * LENGTH] for stream in source.streams]
    assert len(source.streams) == 2 and np.array_equal(seen, np.concatenate(kept))


def test_the_fingerprint_is_of_every_source(texts: Path, prepared: Path) -> None:
    prints = {
        opened(texts, sources=sources).fingerprint
        for sources in (
            [{"name": "a"}],
            [{"name": "a"}, {"name": "b"}],
            [{"name": "b"}, {"name": "a"}],
            [{"name": "a"}, {"name": "b", "path": str(prepared)}],
        )
    }
    assert len(prints) == 4 and all(0 <= each < 2**63 for each in prints)


def test_a_split_of_token_files_travels_by_name(texts: Path, prepared: Path) -> None:
    splits = opened(texts, sources=[{"name": "b", "path": str(prepared)}])
    sent = pickle.dumps(splits.train)
    assert len(sent) < splits.train.tokens + 20_000
    again = pickle.loads(sent)
    assert np.array_equal(again.sample(5), splits.train.sample(5))


def test_a_token_file_that_is_not_there(texts: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing"):
        opened(texts, sources=[{"name": "b", "path": f"{tmp_path}/none.bin"}])


def test_what_another_prepare_held_out_is_refused(texts: Path, tmp_path: Path) -> None:
    prepare(str(texts / "a"), "--out", str(tmp_path / "a"), "--held-out", "20")
    prepare(str(texts / "a"), "--out", str(tmp_path / "a"), "--force")
    with pytest.raises(DataError, match="prepare both again"):
        opened(texts, sources=[{"name": "a", "path": str(tmp_path / "a")}])


def test_ids_beyond_the_vocabulary_are_named_when_they_are_read(texts: Path, tmp_path: Path) -> None:
    prepare(str(texts / "a"), "--out", str(tmp_path / "a"))
    tokens = np.memmap(tmp_path / "a.bin", np.uint16, "r+")
    tokens[5 * LENGTH + 3] = 300
    tokens.flush()
    (source,) = opened(texts, False, sources=[{"name": "a", "path": str(tmp_path / "a")}]).train.sources
    source.window(4)
    with pytest.raises(DataError, match=r"a: ids .* to 300 from token 80"):
        source.window(5)


def test_one_file_twice_and_files_of_two_kinds_are_refused(texts: Path, tmp_path: Path) -> None:
    prepare(str(texts / "a"), "--out", str(tmp_path / "a"))
    for suffix in ("bin", "idx"):
        (tmp_path / f"link.{suffix}").symlink_to(f"a.{suffix}")
    for other in (f"{tmp_path}/a.bin", f"{tmp_path}/a*", f"{tmp_path}/link"):
        with pytest.raises(DataError, match="names it twice"):
            opened(texts, False, sources=[{"name": "a", "path": [str(tmp_path / "a"), other]}])
    (tmp_path / "b.jsonl").write_text('{"text": "b"}')
    with pytest.raises(DataError, match=r"other files such as .*b\.jsonl"):
        opened(texts, False, sources=[{"name": "a", "path": f"{tmp_path}/*"}])


@pytest.mark.parametrize("limit", [{"epochs": 0.001}, {"tokens": LENGTH - 1}])
def test_a_limit_that_allows_nothing_is_refused(texts: Path, limit: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="source a: its epochs and tokens"):
        opened(texts, sources=[{"name": "a", **limit}, {"name": "b"}])


def test_special_tokens_may_come_after_those_that_a_file_was_made_with(texts: Path, tmp_path: Path) -> None:
    """No text encodes to them, so nothing is to be prepared again."""
    prepare(str(texts / "c"), "--out", str(tmp_path / "c"), "--special-token", "<1>")
    sources = [{"name": "c", "path": str(tmp_path / "c")}]
    for more in (["<1>"], ["<1>", "<2>"], ["<1>", "<2>", "<3>"]):
        splits = opened(texts, sources=sources, validated=False, special_tokens=more)
        assert splits.tokenizer.vocab_size == 257 + len(more) and splits.train.windows > 50
    for other in ([], ["<2>", "<1>"]):
        with pytest.raises(DataError, match="special_tokens"):
            opened(texts, sources=sources, validated=False, special_tokens=other)


def test_a_file_that_several_keys_read_is_warned_of(texts: Path, prepared: Path, tmp_path: Path) -> None:
    """Issue 14, item 6: by whichever names and links, with both keys; nothing is said of other files."""
    (tmp_path / "link").symlink_to(texts / "a")
    os.link(texts / "c" / "0.txt", tmp_path / "hard.txt")
    for end in (".bin", ".idx", ".json"):
        (tmp_path / f"b{end}").symlink_to(f"{prepared}{end}")

    def warned(*validation: Path | str, **sources: Path | str) -> list[tuple[str, str]]:
        sets = [{"name": str(index), "path": str(path)} for index, path in enumerate(validation)]
        named = [{"name": name, "path": str(path)} for name, path in sources.items()]
        section = Data.model_validate({"sources": named, "validation": sets, "validation_percent": 0.0})
        return [(finding.key, finding.problem) for finding in find_shared_texts(section)]

    assert warned(texts / "c", a=texts / "a", b=prepared) == []
    assert warned(f"{prepared}-validation", b=prepared) == []
    ((key, problem),) = warned(a=texts / "a", b=tmp_path / "link")
    assert key == "data.sources.1.path" and "data.sources.0.path" in problem and "149 more" in problem
    assert str(texts / "a") in problem
    for source, other in ((texts / "c", tmp_path / "hard.txt"), (prepared, tmp_path / "b"), ("python-stdlib",) * 2):
        ((key, problem),) = warned(other, x=source)
        assert key == "data.validation.0.path" and "data.sources.0.path" in problem, problem


def test_texts_that_are_held_out_for_nothing_are_warned_of(texts: Path, prepared: Path) -> None:
    """Issue 14, item 6: with sets named, nothing reads the held-out share of texts; token files have none of it."""

    def warned(**data: Any) -> list[str]:
        return [finding.key for finding in find_shared_texts(Data.model_validate(data))]

    named = [{"name": "c", "path": str(texts / "c")}]
    assert warned(corpus=str(texts / "a"), validation=named) == ["data.validation_percent"]
    assert warned(corpus=str(texts / "a"), validation=named, validation_percent=0.0) == []
    assert warned(corpus=str(prepared), validation=named) == warned(corpus=str(texts / "a")) == []


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux alone")
def test_texts_that_do_not_fit_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Issue 14, section D: a sentence with key and file before the system kills the process; the limit is lifted."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    monkeypatch.setattr("titanlite.data.memory._free_bytes", lambda: 2**27)
    (tmp_path / "large.txt").touch()
    os.truncate(tmp_path / "large.txt", 2**33)
    with pytest.raises(DataError, match=r"data\.corpus = \['.*large\.txt'\]: .*128\.00 MiB"):
        open_data(Data(corpus=str(tmp_path / "large.txt")), LENGTH, 0)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    (tmp_path / "small.txt").write_text("small " * 100)
    assert open_data(Data(corpus=str(tmp_path / "small.txt")), LENGTH, 0, validated=False).train.windows


def test_each_token_file_is_verified_once_by_one_rank(texts: Path, tmp_path: Path) -> None:
    """Issue 14, item 10."""
    for name in "abc":
        prepare(str(texts / name), "--out", str(tmp_path / name))
    section = Data(
        corpus=f"{tmp_path}/*", special_tokens=["<1>", "<2>", "<3>"], fim_tokens=("<1>", "<2>", "<3>"), fim_rate=0.5
    )
    files = open_data(section, LENGTH, 0, validated=False).token_files
    assert [file.prefix.name for file in files] == ["a", "b", "c"]

    def verify(rank: int, left: str = "") -> Verification:
        found = Verification(files, tmp_path / "verified", rank, 2)
        found.begin()
        found._thread.join()
        assert "".join(file.prefix.name for file in found.end()) == left
        return found

    damaged = (tmp_path / "b.bin").read_bytes()
    (tmp_path / "b.bin").write_bytes(damaged[:-4] + b"\0\0" + damaged[-2:])
    files = open_data(section, LENGTH, 0, validated=False).token_files
    assert verify(0, left="b").failure is None and len(list((tmp_path / "verified").iterdir())) == 2
    failure = verify(1).failure
    assert failure is not None and str(failure).startswith(f"{tmp_path}/b.bin: damaged")
    assert len(list((tmp_path / "verified").iterdir())) == 3
    with pytest.raises(DataError, match=r"b\.bin: damaged"):
        verify(1)
    (tmp_path / "a.bin").unlink()  # verified, and not read again
    assert verify(0).failure is None
