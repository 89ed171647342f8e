"""Token files: what Megatron would read, what of Megatron's is read, and how damage is named."""

from __future__ import annotations

import json
import os
import pickle
import resource
import struct
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titanlite.corpus import token_file
from titanlite.corpus.token_file import (
    FileArray,
    OpenFile,
    SourceInfo,
    TokenFile,
    TokenInfo,
    TokenizerInfo,
    TokenWriter,
)
from titanlite.corpus.tokenizers import open_tokenizer
from titanlite.data.sources import Source
from titanlite.errors import DataError

pytestmark = pytest.mark.quick

SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 8, 7: 4, 8: 2}
SIGNED = {1: False, 2: True, 3: True, 4: True, 5: True, 8: False}


def megatron_read(prefix: Path) -> list[list[int]]:
    """Documents of a token file, by the description of Megatron-LM's indexed format (and nothing of ours)."""
    idx = Path(f"{prefix}.idx").read_bytes()
    assert idx[:9] == b"MMIDIDX\x00\x00"
    assert int.from_bytes(idx[9:17], "little") == 1
    code = idx[17]
    sequences, entries = (int.from_bytes(idx[at : at + 8], "little") for at in (18, 26))
    rest = idx[34:]
    assert len(rest) == 12 * sequences + 8 * entries
    lengths = struct.unpack_from(f"<{sequences}i", rest)
    pointers = struct.unpack_from(f"<{sequences}q", rest, 4 * sequences)
    firsts = struct.unpack_from(f"<{entries}q", rest, 12 * sequences)
    data, size = Path(f"{prefix}.bin").read_bytes(), SIZES[code]

    def sequence(number: int) -> list[int]:
        places = (pointers[number] + size * token for token in range(lengths[number]))
        return [int.from_bytes(data[at : at + size], "little", signed=SIGNED[code]) for at in places]

    return [[token for number in range(first, stop) for token in sequence(number)] for first, stop in pairwise(firsts)]


def megatron_write(prefix: Path, documents: Sequence[Sequence[Sequence[int]]], code: int = 8) -> None:
    """Documents of sequences, as Megatron-LM's preprocessing leaves them."""
    size, sequences = SIZES[code], [sequence for document in documents for sequence in document]
    ids = b"".join(token.to_bytes(size, "little", signed=SIGNED[code]) for sequence in sequences for token in sequence)
    Path(f"{prefix}.bin").write_bytes(ids)
    lengths = list(map(len, sequences))
    pointers = [size * sum(lengths[:number]) for number in range(len(lengths))]
    firsts = [sum(map(len, documents[:number])) for number in range(len(documents) + 1)]
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(sequences), len(firsts))
    arrays = struct.pack(f"<{len(lengths)}i{len(pointers)}q{len(firsts)}q", *lengths, *pointers, *firsts)
    Path(f"{prefix}.idx").write_bytes(head + arrays)


def write(prefix: Path, documents: Sequence[Sequence[int]], vocab_size: int = 257, separator: int = 256) -> TokenInfo:
    """A file of documents that have their separators."""
    writer = TokenWriter(prefix, vocab_size)
    for document in documents:
        writer.extend(np.array(document))
    writer.end_documents([len(document) for document in documents])
    fingerprint = open_tokenizer("bytes").fingerprint
    return writer.commit(
        made_from="x",
        tokenizer=TokenizerInfo(name="bytes", fingerprint=fingerprint, vocab_size=vocab_size, separator=separator),
        text_bytes=sum(map(len, documents)) - len(documents),
        duplicates=0,
        bad_lines=0,
        bad_line_examples=(),
        sources=(SourceInfo(path="a.txt", files=1, bytes=1, documents=len(documents), texts_xxh3_128="0"),),
    )


def read(file: TokenFile) -> list[list[int]]:
    """Documents, by the file's own bounds."""
    return [file.tokens[start:end].tolist() for start, end in pairwise(file.document_bounds(0, file.documents))]


FIXTURE_IDX = (
    b"MMIDIDX\x00\x00" b"\x01\0\0\0\0\0\0\0" b"\x08" b"\x02\0\0\0\0\0\0\0" b"\x03\0\0\0\0\0\0\0"  # head
    b"\x03\0\0\0" b"\x02\0\0\0"  # lengths
    b"\0\0\0\0\0\0\0\0" b"\x06\0\0\0\0\0\0\0"  # positions
    b"\0\0\0\0\0\0\0\0" b"\x01\0\0\0\0\0\0\0" b"\x02\0\0\0\0\0\0\0"  # first sequences
)  # fmt: skip


def test_bytes_are_those_of_the_format(tmp_path: Path) -> None:
    write(tmp_path / "a", [[65, 66, 256], [67, 256]])
    assert (tmp_path / "a.idx").read_bytes() == FIXTURE_IDX
    assert (tmp_path / "a.bin").read_bytes() == b"\x41\0\x42\0\0\x01\x43\0\0\x01"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx", "a.json"]
    megatron_write(tmp_path / "b", [[[65, 66, 256]], [[67, 256]]])
    assert (tmp_path / "b.idx").read_bytes() == FIXTURE_IDX, "the test's own writer"


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Of any lengths and ids, by Megatron's description and by ours."""
    vocab_size = data.draw(st.sampled_from([2, 257, 65_499, 65_500, 2**31 - 1]))
    ids = st.integers(0, vocab_size - 2)
    documents = [
        [*text, vocab_size - 1] for text in data.draw(st.lists(st.lists(ids, max_size=70), min_size=1, max_size=40))
    ]
    prefix = tmp_path_factory.mktemp("written") / "with.dots"
    info = write(prefix, documents, vocab_size, vocab_size - 1)
    assert megatron_read(prefix) == documents
    file = TokenFile.open(prefix)
    assert read(file) == documents
    assert file.tokens.dtype == (np.uint16 if vocab_size < 65_500 else np.int32)
    assert (file.documents, len(file.tokens), file.info) == (len(documents), sum(map(len, documents)), info)
    file.verify_hashes()
    for name, count in info.lengths.items():
        low = 2 ** int(name.removeprefix("2^"))
        assert count == sum(low <= len(document) < 2 * low for document in documents)
    assert sum(info.lengths.values()) == len(documents)


def test_a_document_too_long_for_a_length_is_several_sequences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_file, "LONGEST_SEQUENCE", 4)
    documents = [[1, 256], [*range(8), 256], [256], [1, 2, 3, 256]]
    write(tmp_path / "a", documents)
    assert (tmp_path / "a.idx").read_bytes()[34:58] == struct.pack("<6i", 2, 4, 4, 1, 1, 4)
    assert megatron_read(tmp_path / "a") == documents
    file = TokenFile.open(tmp_path / "a")
    assert read(file) == documents
    file.verify_hashes()


def test_equal_tokens_have_equal_fingerprints(tmp_path: Path) -> None:
    for name, documents in (("a", [[1, 256], [2, 256]]), ("b", [[1, 256], [2, 256]]), ("c", [[1, 256], [3, 256]])):
        write(tmp_path / name, documents)
        megatron_write(tmp_path / f"foreign-{name}", [[document] for document in documents])
    for kind in ("", "foreign-"):
        a, b, c = (TokenFile.open(tmp_path / f"{kind}{name}").fingerprint for name in "abc")
        assert a == b != c


def test_another_process_opens_it_anew(tmp_path: Path) -> None:
    write(tmp_path / "a", [[*range(200), 256]] * 100)
    pickled = pickle.dumps(TokenFile.open(tmp_path / "a"))
    assert len(pickled) < 1_000
    assert len(pickle.loads(pickled).tokens) == 20_100


# Megatron's own files.


@pytest.mark.parametrize("code", [3, 4, 5, 8])
def test_megatrons_files_are_read(tmp_path: Path, code: int) -> None:
    """A document may be several sequences there: its sentences."""
    megatron_write(tmp_path / "m", [[[1, 2], [3, 256]], [[256]], [[4, 5, 6, 256]]], code)
    file = TokenFile.open(f"{tmp_path}/m.bin")
    assert read(file) == megatron_read(tmp_path / "m") == [[1, 2, 3, 256], [256], [4, 5, 6, 256]]
    assert file.info is None
    file.require_tokenizer("bytes", open_tokenizer("bytes"))


def test_megatrons_file_must_fit_the_tokenizer(tmp_path: Path) -> None:
    def refusal(documents: Sequence[Sequence[int]]) -> str:
        megatron_write(tmp_path / "m", [[document] for document in documents])
        with pytest.raises(DataError) as caught:
            TokenFile.open(tmp_path / "m").require_tokenizer("bytes", open_tokenizer("bytes"))
        return str(caught.value)

    said = refusal([[1, 256]] * 2_500 + [[1, 2, 3]])
    assert "m.bin: document 2,500 (tokens 5,000 to 5,003) does not end with the tokenizer's separator, 256" in said
    assert "--append-eod" in said
    assert "m.bin: token 2 (byte 4) is 300, and the tokenizer's ids end at 256" in refusal([[1, 256], [300, 256]])


def test_a_file_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", [[1, 256]])
    file = TokenFile.open(tmp_path / "a")
    file.require_tokenizer("bytes", open_tokenizer("bytes"))
    with pytest.raises(DataError, match=r"a\.json: the tokens are of tokenizer 'bytes' \(257 ids, .* not of 'other'"):
        file.require_tokenizer("other", open_tokenizer("bytes", None, ["<|x|>"]))


def test_documents_of_nothing_are_no_harm(tmp_path: Path) -> None:
    """Megatron keeps empty texts so."""
    megatron_write(tmp_path / "m", [[], [[1, 256]], [], [[2, 256]], [], []])
    file = TokenFile.open(tmp_path / "m")
    assert read(file) == megatron_read(tmp_path / "m") == [[], [1, 256], [], [2, 256], [], []]
    file.require_tokenizer("bytes", open_tokenizer("bytes"))


@pytest.mark.parametrize("value", [-1, 5_000, 2**62])
def test_a_damaged_index_of_megatrons_is_named(tmp_path: Path, value: int) -> None:
    megatron_write(tmp_path / "m", [[[1, 256]]] * 3)
    patched(".idx", 34 + 36 + 8, value.to_bytes(8, "little", signed=True))(tmp_path / "m")
    file = TokenFile.open(tmp_path / "m")
    with pytest.raises(DataError, match=r"m\.idx: damaged: document [12] begins"):
        file.require_tokenizer("bytes", open_tokenizer("bytes"))


# Damage.


def patched(end: str, at: int, data: bytes) -> Callable[[Path], None]:
    """Write `data` over the file's bytes from `at` on."""

    def damage(prefix: Path) -> None:
        with open(f"{prefix}{end}", "r+b") as file:
            file.seek(at, os.SEEK_SET if at >= 0 else os.SEEK_END)
            file.write(data)

    return damage


def cut(end: str, size: int) -> Callable[[Path], None]:
    return lambda prefix: os.truncate(f"{prefix}{end}", size)


def sidecar(change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    def damage(prefix: Path) -> None:
        path = Path(f"{prefix}.json")
        fields = json.loads(path.read_bytes())
        change(fields)
        path.write_text(json.dumps(fields))

    return damage


# Three documents of 3, 2 and 4 tokens: the index has 34 + 3 * 12 + 4 * 8 = 102 bytes, the .bin 18.
DAMAGES = {
    "no index": (lambda prefix: os.remove(f"{prefix}.idx"), "a.idx: missing; a token file is a.bin and a.idx"),
    "no ids": (lambda prefix: os.remove(f"{prefix}.bin"), "a.bin: missing"),
    "empty index": (cut(".idx", 0), "a.idx: cut short: 0 bytes, and the header takes 34"),
    "half a header": (cut(".idx", 20), "a.idx: cut short: 20 bytes"),
    "cut index": (cut(".idx", 101), "a.idx: cut short: 101 bytes, and 3 sequences and 4 document entries"),
    "long index": (cut(".idx", 103), "a.idx: too long: 103 bytes"),
    "magic": (patched(".idx", 0, b"X"), "a.idx: not an index of Megatron's format: byte 0"),
    "version": (patched(".idx", 9, b"\2"), "a.idx: version 2 of the index (byte 9)"),
    "type": (patched(".idx", 17, b"\7"), "a.idx: type 7 of ids (byte 17)"),
    "unknown type": (patched(".idx", 17, b"\x63"), "a.idx: type 99 of ids (byte 17)"),
    "a huge count": (patched(".idx", 18, b"\xff" * 8), "a.idx: cut short: 102 bytes, and 18,446,744,073,709,551,615"),
    "first document": (patched(".idx", 70, b"\1"), "a.idx: damaged: documents begin with sequence 1"),
    "last document": (patched(".idx", -8, b"\2"), "and end with 2 (bytes 70 and 94), not with 0 and 3"),
    "first position": (patched(".idx", 46, b"\2"), "a.idx: damaged: sequences begin at byte 2"),
    "last length": (patched(".idx", 42, b"\xff\xff\xff\xff"), "damaged: sequences begin at byte 0 and end at 8"),
    "cut ids": (cut(".bin", 16), "a.bin: cut short: 16 bytes, and its index ends at byte 18"),
    "long ids": (cut(".bin", 20), "a.bin: too long: 20 bytes, and its index ends at byte 18"),
    "no JSON": (patched(".json", 0, b"["), "a.json: no sidecar that this titanlite knows: "),
    "later version": (sidecar(lambda f: f.update(version=2)), "no sidecar that this titanlite knows: version"),
    "unknown field": (sidecar(lambda f: f.update(extra=2)), "extra: Extra inputs are not permitted"),
    "missing field": (sidecar(lambda f: f.pop("tokens")), "tokens: Field required"),
    "other's sidecar": (sidecar(lambda f: f.update(bin_bytes=20)), "belongs to other files: bytes of a.bin: 20 there"),
    "other counts": (sidecar(lambda f: f.update(tokens=7)), "a.json: belongs to other files: tokens: 7 there, 9 here"),
}  # fmt: skip
HIDDEN = {
    "middle position": (patched(".idx", 54, b"\2"), "a.idx: damaged: its hash is not that of"),
    "middle length": (patched(".idx", 38, b"\5"), "a.idx: damaged: its hash is not that of"),
    "middle document": (patched(".idx", 78, b"\3"), "a.idx: damaged: its hash is not that of"),
    "no separator": (patched(".bin", 8, b"\0\0"), "a.bin: damaged: its hash is not that of"),
    "a flipped bit": (patched(".bin", 12, b"\1"), "a.bin: damaged: its hash is not that of"),
}
"""Damages that opening does not see: it reads none of the bulk."""


@pytest.mark.parametrize(("damage", "said"), {**DAMAGES, **HIDDEN}.values(), ids={**DAMAGES, **HIDDEN})
def test_damage_is_named(tmp_path: Path, damage: Callable[[Path], None], said: str) -> None:
    write(tmp_path / "a", [[7, 8, 256], [9, 256], [10, 0, 11, 256]])
    damage(tmp_path / "a")
    with pytest.raises(DataError) as caught:
        TokenFile.open(tmp_path / "a").verify_hashes()
    assert said in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path))


@pytest.mark.parametrize("damage", [value[0] for value in HIDDEN.values()], ids=HIDDEN)
def test_opening_reads_no_bulk(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    """Or else it would see these."""
    write(tmp_path / "a", [[7, 8, 256], [9, 256], [10, 0, 11, 256]])
    damage(tmp_path / "a")
    TokenFile.open(tmp_path / "a")


def test_no_documents(tmp_path: Path) -> None:
    megatron_write(tmp_path / "m", [])
    with pytest.raises(DataError, match=r"m\.idx: holds no documents"):
        TokenFile.open(tmp_path / "m")
    megatron_write(tmp_path / "m", [[[]]])
    with pytest.raises(DataError, match=r"m\.bin: holds no tokens"):
        TokenFile.open(tmp_path / "m")


def test_an_unfinished_prefix_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.parts").mkdir()
    with pytest.raises(DataError, match=r"a\.idx: missing; `titanlite data prepare` has not ended .* start it again"):
        TokenFile.open(tmp_path / "a")


def test_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a", [[256]])

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", f"{tmp_path}/a.bin")

    monkeypatch.setattr(token_file, "OpenFile", refuse)
    with pytest.raises(DataError, match=r"a\.bin: cannot be read \(Permission denied\)"):
        TokenFile.open(tmp_path / "a")


@pytest.mark.parametrize("packing", ["cut", "best_fit"])
@pytest.mark.parametrize(("end", "size"), [(".bin", 20_003), (".bin", 0), (".idx", 60)])
def test_a_file_that_is_cut_while_it_is_open(tmp_path: Path, packing: str, end: str, size: int) -> None:
    """Issue 14, item 14: an error with file and byte, where a mapped file would end the process by SIGBUS."""
    write(tmp_path / "a", [[*range(200), 256]] * 100)
    file = TokenFile.open(tmp_path / "a")
    source = Source("a", (file,), open_tokenizer("bytes"), 64, False, packing)  # type: ignore[arg-type]
    whole = [source.window(index).tolist() for index in range(source.windows)]
    os.truncate(f"{tmp_path}/a{end}", size)
    with pytest.raises(DataError, match=rf"a\{end}: cut short while it is in use: it ends at byte {size:,}, and had"):
        file.verify_hashes()
    if end == ".idx":
        return
    first = (source.windows * size // 40_200) * 9 // 10
    for index in range(source.windows if packing == "cut" else 0):
        if index < first:
            assert source.window(index).tolist() == whole[index]
    with pytest.raises(
        DataError, match=rf"a\.bin: cut short while it is in use: it ends at byte {size:,}, and had 40,2"
    ):
        [source.window(index) for index in range(source.windows)]


def test_numbers_are_read_as_an_array_has_them(tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).integers(0, 2**31, 5_000).astype("<i4")
    (tmp_path / "a").write_bytes(b"head" + numbers.tobytes())
    read = FileArray(OpenFile(tmp_path / "a"), 4, numbers.dtype, len(numbers))
    places = [
        np.array(each, np.int64) for each in ([], [7], [5, 4, 4_999, 0, 1, 2, 70, 3_000, 3_001], range(0, 5_000, 20))
    ]
    keys: list[Any] = [0, -1, 4_999, np.int64(3), slice(None), slice(10, 20), slice(-3, None), slice(9, 3), *places]
    for key in keys:
        assert np.array_equal(read[key], numbers[key]), key
    with pytest.raises(IndexError):
        read[5_000]


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    write(tmp_path / "a", [[256]])
    os.remove(tmp_path / "a.bin")
    os.mkfifo(tmp_path / "a.bin")
    with pytest.raises(DataError, match=r"a\.bin: .*not a regular file"):
        TokenFile.open(tmp_path / "a")


def test_nothing_appears_before_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each rename the index, without which nobody takes the rest for a token file, is not there yet."""
    seen: list[set[str]] = []
    replace = os.replace

    def watched(source: Path, target: Path) -> None:
        seen.append({path.name for path in tmp_path.iterdir() if not path.name.startswith(".")})
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    write(tmp_path / "a", [[1, 256]])
    assert seen == [set(), {"a.bin"}, {"a.bin", "a.json"}]
    write(tmp_path / "a", [[1, 2, 256]])
    assert all("a.idx" not in names for names in seen[4:]), "an old index and new ids are never together"


# Size.


def test_a_hundred_gigabytes_are_opened_without_reading_them(tmp_path: Path) -> None:
    """50 documents of 10^9 tokens, 100 GB that take no room: neither memory nor reads go with them."""
    count, length = 50, 10**9
    with open(tmp_path / "a.bin", "wb") as file:
        for number in range(1, count + 1):
            file.seek(2 * number * length - 2)
            file.write(b"\x00\x01")
    lengths, pointers = [length] * count, [2 * length * number for number in range(count)]
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, count, count + 1)
    Path(tmp_path / "a.idx").write_bytes(
        head + struct.pack(f"<{count}i{2 * count + 1}q", *lengths, *pointers, *range(51))
    )
    before = resource.getrusage(resource.RUSAGE_SELF)
    file = TokenFile.open(tmp_path / "a")
    assert (len(file.tokens), file.documents, len(file.fingerprint)) == (50 * 10**9, 50, 24)
    assert file.tokens[49 * 10**9 - 2 : 49 * 10**9].tolist() == [0, 256]
    assert file.document_bounds(40, 41).tolist() == [40 * 10**9, 41 * 10**9]
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_minflt + after.ru_majflt - before.ru_minflt - before.ru_majflt < 10_000, "40 MB of pages"


def test_pointers_inside_documents_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A foreign file of 1,001 documents of 300 sequences: memory goes with the documents."""
    sequences = np.append(np.arange(0, 300 * 1000, 300), [300_000, 300_001, 300_001])  # the last document is empty
    pointers = 2 * np.arange(300_001)
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, len(pointers), len(sequences))
    arrays = (np.ones(len(pointers), "<i4"), pointers.astype("<i8"), sequences.astype("<i8"))
    Path(tmp_path / "a.idx").write_bytes(head + b"".join(array.tobytes() for array in arrays))
    Path(tmp_path / "a.bin").write_bytes(bytes(2 * len(pointers)))
    file = TokenFile.open(tmp_path / "a")
    sizes: list[int] = []
    read = OpenFile.read

    def watched(self: OpenFile, offset: int, size: int) -> bytes:
        sizes.append(size)
        return read(self, offset, size)

    monkeypatch.setattr(OpenFile, "read", watched)
    assert file.document_ends().tolist() == sequences[1:].tolist()
    assert max(sizes) <= 8 * len(sequences)
