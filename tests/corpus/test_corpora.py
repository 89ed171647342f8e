"""Corpus readers: what they yield, under which names, and how they refuse."""

from __future__ import annotations

import bz2
import glob
import gzip
import inspect
import io
import json
import json.decoder
import lzma
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
import safetensors.numpy
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from titanlite.corpus.corpora import READERS, Document, FoundFile, files, read_corpus, readers
from titanlite.corpus.corpora.files import match_files
from titanlite.errors import EXIT_RECIPE, DataError
from titanlite.recipe.sections import Data


def arrow_bytes(table: pyarrow.Table, form: str = "stream") -> bytes:
    sink = pyarrow.BufferOutputStream()
    if form == "feather":
        pyarrow.feather.write_feather(table, sink, compression="lz4")
    else:
        new = pyarrow.ipc.new_stream if form == "stream" else pyarrow.ipc.new_file
        with new(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=1000)
    return sink.getvalue().to_pybytes()


def parquet_bytes(table: pyarrow.Table) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def zipped(content: bytes) -> bytes:
    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
        archive.writestr("a.txt", content)
    return file.getvalue()


def tarred(content: bytes) -> bytes:
    with tarfile.open(fileobj=(file := io.BytesIO()), mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"), io.BytesIO(content))
    return file.getvalue()


def saved_array() -> bytes:
    np.save(file := io.BytesIO(), np.arange(5))
    return file.getvalue()


def documents(corpus: str | list[str], text_key: str = "text") -> list[Document]:
    return list(read_corpus([corpus] if isinstance(corpus, str) else corpus, Data(text_key=text_key)))


def refusal(corpus: Path | str | list[str], text_key: str = "text") -> str:
    with pytest.raises(DataError) as caught:
        documents(str(corpus) if isinstance(corpus, Path) else corpus, text_key)
    assert caught.value.exit_code == EXIT_RECIPE
    return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in {
        "b.txt": b"bee",
        "a.md": b"\xff\x00 any bytes",
        "sub/c.TXT": b"sea",
        "sub/lines.jsonl": b'{"text": "one"}\n\n{"text": ""}\r\n{"text": "f\xc3\xbcnf", "id": 5}',
        "empty.txt": b"",
        "code.py": b"pass",
        ".hidden.txt": b"no",
        ".git/x.txt": b"no",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path


EXPECTED = [
    ("a.md", b"\xff\x00 any bytes"),
    ("b.txt", b"bee"),
    ("sub/c.TXT", b"sea"),
    ("sub/lines.jsonl:1", b"one"),
    ("sub/lines.jsonl:4", "fünf".encode()),
]


def test_folder(folder: Path) -> None:
    assert documents(str(folder)) == EXPECTED
    assert documents(f"{folder}/") == EXPECTED


def test_names_do_not_depend_on_where_the_corpus_lies(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = folder.rename(folder.with_name("moved"))
    monkeypatch.chdir(moved)
    assert documents(".") == documents(str(moved)) == EXPECTED
    assert documents("*/*") == documents(f"{moved}/*/*") == EXPECTED[2:]


def test_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))
    assert documents("~/b.txt") == documents("~/b.*") == [("b.txt", b"bee")]


def test_files_named_or_matched_are_taken_whatever_their_suffix(folder: Path) -> None:
    assert documents(str(folder / "code.py")) == [("code.py", b"pass")]
    assert documents(f"{folder}/**/*.py") == [("code.py", b"pass")]


def test_a_name_that_looks_like_a_glob_is_a_name_first(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_bytes(b"one")
    assert documents(str(tmp_path / "a[1].txt")) == [("a[1].txt", b"one")]


def test_list_in_its_order(folder: Path) -> None:
    assert documents([f"{folder}/sub", f"{folder}/b.txt"]) == [
        *((name.removeprefix("sub/"), content) for name, content in EXPECTED[2:]),
        ("b.txt", b"bee"),
    ]


def test_linked_folders_are_read_once(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "far.txt").write_bytes(b"far")
    (folder / "sub" / "link").symlink_to(elsewhere)
    (folder / "sub" / "loop").symlink_to(folder)
    (folder / "zlink").symlink_to(elsewhere)
    assert documents(str(folder)) == sorted([*EXPECTED, ("sub/link/far.txt", b"far")])


@pytest.mark.parametrize("pattern", ["", "/**/*.t*", "/**/**/*.txt", "/**", "/*/**/*.txt", "/**/sub/**/*.txt", "/*/*"])
def test_links_to_folders_above_are_read_once(tmp_path: Path, pattern: str) -> None:
    """Issue 14, item 7: one such link made `**` read a text 41 times; two did not end."""
    (tmp_path / "a.txt").write_bytes(b"a")
    (tmp_path / "sub" / "deep").mkdir(parents=True)
    (tmp_path / "sub" / "deep" / "b.txt").write_bytes(b"b")
    (tmp_path / "sub" / "c.txt").write_bytes(b"c")
    for number, folder in enumerate((tmp_path, tmp_path / "sub", tmp_path / "sub" / "deep")):
        for up in (tmp_path, tmp_path / "sub"):
            (folder / f"link{number}{up.name[0]}").symlink_to(up)
    (tmp_path / "sub" / "z.txt").symlink_to("c.txt")
    found = [content for _, content in documents(f"{tmp_path}{pattern}")]
    assert sorted(found) == [b"a", b"b", b"c"][:: 2 if pattern == "/*/*" else 1]


def test_stars_match_as_the_library_s(folder: Path) -> None:
    """Where there are no links."""
    (folder / "sub" / "deep" / "sub").mkdir(parents=True)
    (folder / "sub" / "deep" / "sub" / "d.txt").write_bytes(b"d")
    for pattern in ("**", "**/*", "**/*.txt", "sub/**", "**/sub/*", "**/sub/**/*.txt", "*/**/d*", "**/deep", ".git/**"):
        mine, theirs = (
            {path for path in paths if os.path.isfile(path)}
            for paths in (match_files(f"{folder}/{pattern}"), glob.glob(f"{folder}/{pattern}", recursive=True))
        )
        assert mine == theirs


def test_byte_order_mark_and_text_key(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"body": "hi"}\n')
    assert documents(str(tmp_path / "x.jsonl"), text_key="body") == [("x.jsonl:1", b"hi")]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_jsonl_round_trip(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    path = tmp_path_factory.mktemp("jsonl") / "x.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts) or "\n", encoding="utf-8")
    expected = [(f"x.jsonl:{n}", text.encode()) for n, text in enumerate(texts, start=1) if text]
    assert documents(str(path)) == expected


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [(".gz", gzip.compress), (".zst", zstandard.compress)],
    ids=["gzip", "zstd"],
)
def test_packed_files(tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]) -> None:
    """Also of several pieces, each packed by itself, as `cat a.gz b.gz` makes them."""
    (tmp_path / f"a.txt{suffix}").write_bytes(pack(b"one \xff") + pack(b"") + pack(b" text"))
    long = "x" * 3_000_000
    rows = [json.dumps({"text": text}).encode() + b"\n" for text in ("one", "two", long)]
    (tmp_path / f"b.JSONL{suffix}").write_bytes(b"".join(map(pack, rows)))
    (tmp_path / f"c.md{suffix}").touch()
    (tmp_path / f"d.text{suffix}").write_bytes(pack(b""))
    expected = [(f"b.JSONL{suffix}:{n}", text.encode()) for n, text in enumerate(("one", "two", long), start=1)]
    assert documents(str(tmp_path)) == [(f"a.txt{suffix}", b"one \xff text"), *expected]


def test_parquet(tmp_path: Path) -> None:
    columns = {"id": [1, 2, 3], "body": ["one", "", "f\u00fcnf"]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "x.parquet")
    expected = [("x.parquet:1", b"one"), ("x.parquet:3", "f\u00fcnf".encode())]
    assert documents(str(tmp_path), text_key="body") == expected
    kinds = (pyarrow.large_string(), pyarrow.binary(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string()))
    for kind in kinds:
        table = pyarrow.table({"body": pyarrow.array(columns["body"]).cast(kind)})
        pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
        assert documents(str(tmp_path), text_key="body") == expected


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.sampled_from([b"", b"\r", b'{"text": "a"}', b'{"text": "' + b"b" * 40 + b'"} '])), st.integers(1, 60)
)
def test_parts_of_lines_are_the_whole(tmp_path_factory: pytest.TempPathFactory, rows: list[bytes], size: int) -> None:
    """Wherever a file is cut, each line is read once, under its number."""
    path = tmp_path_factory.mktemp("parts") / "x.jsonl"
    for content in (b"\n".join(rows), b"\n".join(rows) + b"\n"):
        path.write_bytes(content)
        whole = FoundFile("x", path, "lines", len(content), 0)
        found = []
        for part in readers.divide(whole, size) or [None]:
            if part is not None:
                part = part._replace(before=readers.count_newlines(path, 0, part.first))
            found += readers.read_documents(whole._replace(part=part), "text")
        assert found == list(readers.read_documents(whole, "text"))
        assert len(found) == sum(len(row) > 1 for row in rows)


# Refusals: each names the file (and line) and says what to do.


@pytest.mark.parametrize(
    ("entry", "named", "said"),
    [
        ("absent.txt", "absent.txt", "no file or folder"),
        ("\0", "", "no file or folder"),
        ("b.txt/x", "b.txt/x", "no file or folder"),
        ("loop.txt", "loop.txt", "cannot be read ("),
        ("*.rst", "*.rst", "no file matches"),
        ("su*", "su*", "matches only folders"),
        ("empty.txt", "empty.txt", "the file is empty"),
        ("code", "code", ".txt, .text, .md, .jsonl"),
        ("code", "code", "**/*.py"),
        ("links", "links/gone.txt", "cannot be read (No such file"),
        ("pipe.txt", "pipe.txt", "not a regular file"),
        ("pipes", "pipes/pipe.txt", "not a regular file"),
    ],
)
def test_what_is_no_corpus_is_named(folder: Path, entry: str, named: str, said: str) -> None:
    (folder / "loop.txt").symlink_to("loop.txt")
    for name in ("code", "links", "pipes"):
        (folder / name).mkdir()
    (folder / "code" / "x.py").write_bytes(b"pass")
    (folder / "links" / "gone.txt").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.txt")
    os.mkfifo(folder / "pipes" / "pipe.txt")
    message = refusal(f"{folder}/{entry}")
    assert message.startswith(f"{folder}/{named}") and said in message


def test_a_corpus_that_is_misspelt() -> None:
    assert "did you mean 'python-stdlib'" in refusal("python-stdlb")


def test_unreadable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *_: object, **__: object) -> None:  # root may read anything, so the refusal is acted
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", refuse)
    message = refusal(folder / "b.txt")
    assert "b.txt: cannot be read (Permission denied)" in message
    assert "permissions" in message


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read anything")
def test_unreadable_folder(folder: Path) -> None:
    (folder / "sub").chmod(0)
    try:
        assert "sub: cannot be read (Permission denied)" in refusal(folder)
    finally:
        (folder / "sub").chmod(0o755)


@pytest.mark.parametrize("pattern", ["", "**/*.txt"])
def test_folder_that_cannot_be_entered(folder: Path, monkeypatch: pytest.MonkeyPatch, pattern: str) -> None:
    """Issue 14, item 7: as another process's folders below `/proc`, it is listed and cannot be followed."""
    stat_ = os.stat

    def refuse(path: Any, *words: Any, **named: Any) -> os.stat_result:
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return stat_(path, *words, **named)

    monkeypatch.setattr(os, "stat", refuse)
    assert "sub: cannot be read (Permission denied)" in refusal(folder / pattern)


def test_file_named_twice(folder: Path) -> None:
    for corpus in ([str(folder), f"{folder}/sub/../b.txt"], [f"{folder}/b.txt"] * 2):
        assert "b.txt: data.corpus names it twice" in refusal(corpus)
    assert documents(f"{folder}/**/**/b.txt") == [("b.txt", b"bee")]


@pytest.mark.parametrize(
    "name",
    [
        "x.tar.gz", "x.zip", "x.txt.xz", "x.parquet.gz", "x.jsonl.gz.gz", "x.npy.zst", "x.npz", "x.pkl", "x.pt",
        "x.mds", "x.safetensors", "x.tfrecord", "x.docx", "x.sqlite", "x.lz4", "x.br", "x.7z", "x.CSV", "x.tsv", "x.pq",
    ],
)  # fmt: skip
def test_what_is_no_text(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"any, thing")
    suffix = "".join(Path(name).suffixes[-2 if name.endswith((".gz", ".zst")) else -1 :])
    assert f"{name}: a {suffix} file is not text" in refusal(tmp_path / name)


@pytest.mark.parametrize("name", ["x", "x.txt", "x.md.gz", "x.jsonl", "x.json"])
@pytest.mark.parametrize(
    ("kind", "content"),
    {
        "gzip": gzip.compress(b"text"), "zstd": zstandard.compress(b"text"), "bzip2": bz2.compress(b"text"),
        "xz": lzma.compress(b"text"), "Parquet": parquet_bytes(pyarrow.table({"text": ["a"]})),
        "Arrow": arrow_bytes(pyarrow.table({"text": ["a"]})), "safetensors": safetensors.numpy.save({"x": np.ones(3)}),
        "SQLite": b"SQLite format 3\0" + bytes(80), "pickle": pickle.dumps({"text": "a"}), "zip": zipped(b"text"),
        "tar": tarred(b"text"), "UTF-16 or UTF-32": '{"text": "a"}'.encode("utf-16"), "NumPy": saved_array(),
        "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1",
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_binary_under_the_name_of_text(tmp_path: Path, name: str, kind: str, content: bytes) -> None:
    """Issue 14, item 4."""
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert f"{name}: begins as a {kind} file does" in refusal(tmp_path / name)


ROWS = b"".join(json.dumps({"text": f"document {number}", "url": "x"}).encode() + b"\n" for number in range(2000))


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", ["c4-train.00000-of-01024.json", "a.ndjson", "a.jsonlines", "a.JSON", "part-00000"])
def test_json_lines_under_other_names(tmp_path: Path, name: str, packed: str) -> None:
    """Issue 14, item 4: 2,000 documents, not one of raw JSON; and a folder of them is taken."""
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[packed]
    (tmp_path / (name + packed)).write_bytes(pack(b"\n" + ROWS))
    expected = [(f"{name}{packed}:{n + 2}", f"document {n}".encode()) for n in range(2000)]
    assert documents(str(tmp_path / (name + packed))) == expected
    if name != "part-00000":
        assert documents(str(tmp_path)) == expected


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", b'[{"text": "one"}]', "jq -c '.[]'"),
        ("a.json", b"[1]", "jq -c '.[]'"),
        ("a.txt", b'[\n {"id": 1, "text": "one"}]', "jq -c '.[]'"),
        ("a.json", b'{\n "text": "one"\n}', "jq -c ."),
        ("a.json", b'{"body": "one"}\n{"body": "two"}', "a.json:1: no field 'text' (it has 'body'); set data.text_key"),
        ("a.ndjson", b'{"body": "one"}', "a.ndjson:1: no field 'text'"),
        ("part-00000", b'{"body": "one"}\n{"body": "two"}', "part-00000:1: no field 'text' (it has 'body')"),
        ("a.txt", b'{"meta": 1}\n{"text": "hi"}', "a.txt:1: no field 'text' (it has 'meta')"),
        ("a.json", b'{"text": "one"}\n{"text": ', "a.json:2: invalid JSON"),
    ],
)
def test_json_that_is_no_lines_of_text(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert said in refusal(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", b'{\n "name": "x"\n}'), ("a.json", b'{"a": 1}'), ("a.json", b""), ("a.json", b'"x"'),
        ("a.json", b'{"a": ' * 99_999), ("a.py", b'{"a"}'), ("a", b"[a](b)"), ("a.txt", b"{text} on"), ("a.txt", b"[["),
    ],
)  # fmt: skip
def test_json_of_programs_is_text(tmp_path: Path, name: str, content: bytes) -> None:
    """But not in a folder of texts, where it lies beside them."""
    (tmp_path / name).write_bytes(content)
    (tmp_path / "b.txt").write_bytes(b"text")
    (tmp_path / "c.json").write_bytes(b"[1, 2]")
    assert documents(f"{tmp_path}/[ab]*") == [(name, content), ("b.txt", b"text")][not content :]
    if name == "a.json":
        assert documents(str(tmp_path)) == [("b.txt", b"text")]


# A dataset that `datasets` saved to a folder.


def write_dataset(folder: Path, **state: object) -> Path:
    """A folder of one file of two documents, of which `state` says the rest."""
    folder.mkdir(exist_ok=True)
    (folder / "data.arrow").write_bytes(arrow_bytes(pyarrow.table({"text": ["one", "two"]})))
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}], **state}))
    return folder


def test_dataset(tmp_path: Path) -> None:
    kept = {"_indices_files": [], "_indices_data_files": None, "_split": "train"}
    assert documents(str(write_dataset(tmp_path, **kept))) == [("data.arrow:1", b"one"), ("data.arrow:2", b"two")]


@pytest.mark.parametrize(
    "state",
    [
        {"_indices_data_files": [{"filename": "indices.arrow"}]},
        {"_indices_files": [{"filename": "indices.arrow"}]},
        {"_data_files": [{"filename": "data.arrow", "skip": 1, "take": 1}]},
    ],
)
def test_dataset_of_chosen_rows(tmp_path: Path, state: dict[str, object]) -> None:
    """Issue 14, item 5: rows that were filtered out lie in the files all the same."""
    assert "flatten_indices()" in refusal(write_dataset(tmp_path, **state))


@pytest.mark.parametrize(
    "name",
    [
        "../secret.arrow", "../../etc/passwd", "/etc/passwd", "sub/data.arrow", "..", "", "state.json", 3, None,
        "a\0.arrow", "\ud800.arrow", "absent.arrow",
    ],
)  # fmt: skip
def test_dataset_that_leads_elsewhere(tmp_path: Path, name: object) -> None:
    """Issue 14, item 5."""
    (tmp_path / "secret.arrow").write_bytes(arrow_bytes(pyarrow.table({"text": ["secret"]})))
    folder = write_dataset(tmp_path / "dataset", _data_files=[{"filename": "data.arrow"}, {"filename": name}])
    said = refusal(folder)
    assert ("absent.arrow: cannot be read" if name == "absent.arrow" else "state.json: names ") in said


@pytest.mark.parametrize("state", [b"", b"[]", b"{}", b"[" * 99_999, b'{"_data_files": 3}', b'{"_data_files": ["ab"]}'])
def test_dataset_without_a_state(tmp_path: Path, state: bytes) -> None:
    (write_dataset(tmp_path) / "state.json").write_bytes(state)
    assert "state.json: not the state of a Hugging Face dataset" in refusal(tmp_path)


# Arrow (issue 14, item 9; for files that are damaged see test_hostile.py).


@pytest.mark.parametrize("write", ["stream", "file", "feather"])
def test_arrow(tmp_path: Path, write: str) -> None:
    texts = ["one", "", "fünf"] * 700
    expected = [(f"x.arrow:{n}", text.encode()) for n, text in enumerate(texts, 1) if text]
    dictionary = pyarrow.dictionary(pyarrow.int32(), pyarrow.string())
    for kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), pyarrow.string_view(), dictionary):
        table = pyarrow.table({"id": range(2100), "body": pyarrow.array(texts).cast(kind)})
        (tmp_path / "x.arrow").write_bytes(arrow_bytes(table, write))
        assert documents(str(tmp_path / "x.arrow"), text_key="body") == expected
    (tmp_path / "x.arrow").rename(tmp_path / "x.feather")
    assert [text for _, text in documents(str(tmp_path / "x.feather"), "body")] == [text for _, text in expected]


def test_feather_of_version_1(tmp_path: Path) -> None:
    (tmp_path / "x.feather").write_bytes(b"FEA1" + bytes(60) + b"FEA1")
    assert "write it again as version 2" in refusal(tmp_path / "x.feather")


@pytest.mark.parametrize(
    ("column", "said"),
    [
        (pyarrow.array([["a"]]), "column 'text' is not text but list<"),
        (pyarrow.array([b"abcd"], pyarrow.binary(4)), "column 'text' is not text but fixed_size_binary[4]"),
        (pyarrow.array([1]), "column 'text' is not text but int64"),
        (pyarrow.array([1]).dictionary_encode(), "column 'text' is not text but "),
        (pyarrow.array([b"\xff"]).view(pyarrow.string()), "damaged or cut short ("),
        (None, "column 'text' is there 2 times"),
    ],
)
@pytest.mark.parametrize("name", ["x.arrow", "x.parquet"])
def test_columns_that_are_no_text(tmp_path: Path, name: str, column: pyarrow.Array | None, said: str) -> None:
    """Also text that is not UTF-8, and two columns of one name."""
    columns = [pyarrow.array(["a"])] * 2 if column is None else [column]
    table = pyarrow.table(columns, ["text"] * len(columns))
    (tmp_path / name).write_bytes(arrow_bytes(table) if name == "x.arrow" else parquet_bytes(table))
    message = refusal(tmp_path / name)
    assert f"{name}: {said}" in message


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"text": "x"', "column 13"),
        (b'{"text": "\xff"}', "0xff at position 11"),
        (b'"just a string"', '{"text": "..."}'),
        (b'{"texts": "x"}', "no field 'text' (did you mean 'texts'?)"),
        (b'{"id": 1, "body": "x"}', "no field 'text' (it has 'id', 'body'); set data.text_key"),
        (b"{}", "no field 'text'"),
        (b'{"text": ["x"]}', "list"),
        (b'{"text": null}', "NoneType"),
        (b'{"text": "\\ud83d"}', "character 1"),
        (b'{"text": ' + b"[" * 100_000, "delete the line"),
        (b'{"text": ' + b"9" * 5000 + b"}", ""),
    ],
    ids=["cut", "latin", "string", "near", "absent", "bare", "list", "null", "surrogate", "deep", "digits"],
)
def test_bad_line(tmp_path: Path, line: bytes, expected: str) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path / 'x.jsonl'}:3: ")
    assert expected in message


def test_a_reader_from_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One module and one line in the registry; its bad rows are named as those of any other."""
    (tmp_path / "csv_texts.py").write_text(
        "from titanlite.corpus.corpora import Reader\n"
        "from titanlite.errors import DataError\n"
        "def read(path, text_key, part):\n"
        "    for number, line in enumerate(path.read_bytes().splitlines(), 1):\n"
        "        yield number, line.split(b',')[1] if b',' in line else DataError(f'{path}:{number}: no comma')\n"
        "CSV = Reader(read)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(READERS._entries, ".csv", "csv_texts:CSV")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.csv").write_text("1,one\n2,two\n")
    assert documents(f"{tmp_path}/texts") == documents(f"{tmp_path}/texts/*") == [
        ("a.csv:1", b"one"), ("a.csv:2", b"two")
    ]  # fmt: skip
    (tmp_path / "texts" / "a.csv").write_text("1,one\n2\n")
    assert "a.csv:2: no comma" in refusal(tmp_path / "texts")


# The standard library.


def test_stdlib() -> None:
    found = dict(documents("python-stdlib"))
    names = list(found)
    assert names == sorted(names)
    assert len(names) > 500
    assert found["json/decoder.py"] == Path(inspect.getfile(json.decoder)).read_bytes()
    assert all(found.values())
    assert not any("site-packages" in name or "_sysconfigdata" in name or "\\" in name for name in names)


def test_stdlib_leaves_out_what_an_installation_adds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "os.py",
        "test/test_os.py",
        "test/__pycache__/cached.py",
        "site-packages/numpy.py",
        "dist-packages/numpy.py",
        "config-3.11-x86_64-linux-gnu/python-config.py",
        "_sysconfigdata__linux_x86_64-linux-gnu.py",
        "sitecustomize.py",
        "LICENSE.txt",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"pass")
    (tmp_path / "empty.py").touch()
    monkeypatch.setattr(files.sysconfig, "get_path", lambda name: str(tmp_path))
    assert [document.name for document in documents("python-stdlib")] == ["os.py", "test/test_os.py"]


def test_stdlib_without_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.sysconfig, "get_path", lambda name: str(tmp_path))
    assert "installed without the source of its standard library" in refusal("python-stdlib")
