"""Corpus readers: what they yield, under which names, and how they refuse."""

from __future__ import annotations

import gzip
import inspect
import json
import json.decoder
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from titanlite.data.corpora import Document, formats, python_stdlib, read_corpus
from titanlite.errors import EXIT_RECIPE, DataError
from titanlite.recipe.sections import Data


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
        found = []
        for part in formats.divide(path, "lines", len(content), size) or [None]:
            if part is not None:
                part = part._replace(before=formats.count_newlines(path, 0, part.first))
            found += formats.documents("x", path, "lines", "text", part=part)
        assert found == list(formats.documents("x", path, "lines", "text"))
        assert len(found) == sum(len(row) > 1 for row in rows)


# Refusals: each names the file (and line) and says what to do.


def test_missing_path(tmp_path: Path) -> None:
    message = refusal(tmp_path / "absent.txt")
    assert str(tmp_path / "absent.txt") in message
    assert "no file or folder" in message
    assert "did you mean 'python-stdlib'" in refusal("python-stdlb")
    assert "no file or folder" in refusal(f"{tmp_path}/\0")


def test_below_a_file(folder: Path) -> None:
    assert "no file or folder" in refusal(folder / "b.txt" / "x")


def test_link_to_itself(tmp_path: Path) -> None:
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    assert "loop.txt: cannot be read (" in refusal(tmp_path / "loop.txt")


def test_dangling_link_in_a_folder(folder: Path) -> None:
    (folder / "gone.txt").symlink_to("nowhere")
    assert "gone.txt: cannot be read (No such file" in refusal(folder)


def test_unreadable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:  # root may read anything, so the refusal is acted
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
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


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_named_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    assert "pipe.txt: not a regular file" in refusal(tmp_path / "pipe.txt")
    assert "pipe.txt: not a regular file" in refusal(tmp_path)


def test_glob_without_match(folder: Path) -> None:
    message = refusal(f"{folder}/*.rst")
    assert "*.rst: no file matches" in message
    assert "matches only folders" in refusal(f"{folder}/su*")


def test_empty_file_named_itself(folder: Path) -> None:
    assert f"{folder / 'empty.txt'}: the file is empty" in refusal(folder / "empty.txt")


def test_folder_without_text(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_bytes(b"pass")
    message = refusal(tmp_path)
    assert ".txt, .text, .md, .jsonl" in message
    assert "**/*.py" in message


def test_file_named_twice(folder: Path) -> None:
    for corpus in ([str(folder), f"{folder}/sub/../b.txt"], [f"{folder}/b.txt"] * 2):
        assert "b.txt: data.corpus names it twice" in refusal(corpus)
    assert documents(f"{folder}/**/**/b.txt") == [("b.txt", b"bee")]


@pytest.mark.parametrize("name", ["x.tar.gz", "x.zip", "x.txt.xz", "x.parquet.gz", "x.jsonl.gz.gz", "x.npy.zst"])
def test_what_is_no_text(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x1f\x8b")
    assert f"{name}: a .{name.rpartition('.')[2]} file is not text" in refusal(tmp_path / name)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"text": "x"', "invalid JSON at column 13"),
        (b'{"text": "\xff"}', "not UTF-8: byte 0xff at position 11"),
        (b'"just a string"', 'a JSON object is wanted, such as {"text": "..."}'),
        (b'{"texts": "x"}', "no field 'text' (did you mean 'texts'?)"),
        (b'{"id": 1, "body": "x"}', "no field 'text' (it has 'id', 'body'); set data.text_key"),
        (b"{}", "no field 'text' (it has none)"),
        (b'{"text": ["x"]}', "field 'text' is not a string but list"),
        (b'{"text": null}', "field 'text' is not a string but NoneType"),
        (b'{"text": "\\ud83d"}', "half of a surrogate pair at character 1"),
        (b'{"text": ' + b"[" * 100_000, "JSON that cannot be read"),
        (b'{"text": ' + b"9" * 5000 + b"}", ""),
    ],
    ids=["cut", "latin", "string", "near", "absent", "bare", "list", "null", "surrogate", "deep", "digits"],
)
def test_bad_line(tmp_path: Path, line: bytes, expected: str) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path / 'x.jsonl'}:3: ")
    assert expected in message


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
    monkeypatch.setattr(python_stdlib.sysconfig, "get_path", lambda name: str(tmp_path))
    assert [document.name for document in documents("python-stdlib")] == ["os.py", "test/test_os.py"]


def test_stdlib_without_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(python_stdlib.sysconfig, "get_path", lambda name: str(tmp_path))
    assert "installed without the source of its standard library" in refusal("python-stdlib")
