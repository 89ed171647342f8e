"""Damaged and hostile files, hundreds of each kind: no crash, no traceback, no bytes that are not the file's.

Issue 14, items 5, 9, 14 and 16. The files are read by a child process, so that a signal that ends it is seen; it
reports each one, and is started again after the one that ended it.
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from support import bpe

from titanlite.cli.data import describe_token_info
from titanlite.corpus.corpora import Document, FoundFile, read_corpus
from titanlite.corpus.corpora.readers import divide, read_documents
from titanlite.corpus.token_file import TokenFile
from titanlite.corpus.tokenizers import open_tokenizer
from titanlite.data.sources import Source
from titanlite.errors import DataError
from titanlite.recipe.sections import Data

SECRET = b"a secret of another file"
TEXTS = [f"document {number} of {'many words ' * (number % 5)}" for number in range(40)]
JUNK = [None, True, -1, 3, 10**12, 2**70, 1e300, "", "BPE", "../secret.arrow", "\ud800", [], [1], ["a", "b"], {}]
LIKES = [True, False, 0, 1, 5, 399, 65_535, "", "a", "▁", "aa", "[UNK]", "</s>", "ByteLevel", "Replace", "BPE"]
NUMBERS = [0, 1, 127, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]


def mutated(content: bytes, chance: random.Random) -> bytes:
    """With one to three changes of bits, bytes, numbers or length."""
    data = bytearray(content)
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(data) or 1)
        size = chance.choice([1, 2, 4, 8])
        number = (chance.choice(NUMBERS) % 256**size).to_bytes(size, "little")
        change = chance.randrange(7)
        if change == 0 and data:
            data[at] ^= 1 << chance.randrange(8)
        elif change == 1:
            data[at : at + 1] = bytes([chance.randrange(256)])
        elif change in (2, 3):
            data[at - at % size : at - at % size + size] = number
        elif change == 4:
            del data[at : at + chance.choice([1, 8, 64, len(data)])]
        elif change == 5:
            data[at:at] = data[at : at + chance.choice([1, 8, 64])]
        else:
            data[at : at + 16] = bytes(len(data[at : at + 16]))
    return bytes(data)


def mutated_json(fields: Any, chance: random.Random) -> bytes:
    """With one value replaced by anything, or by one of its kind, or taken out; every fourth time bytes changed."""
    if chance.randrange(4) == 0:
        return mutated(json.dumps(fields).encode(), chance)
    place = fields = json.loads(json.dumps(fields))
    while True:
        key = chance.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if not isinstance(place[key], dict | list) or not place[key] or chance.randrange(4) == 0:
            break
        place = place[key]
    value = place[key]
    likes = [each for each in LIKES if type(each) is type(value)] or [value]
    place[key] = chance.choice([chance.choice([*JUNK, {key: value}, [value] * 2]), *[chance.choice(likes)] * 2])
    if chance.randrange(5) == 0:
        del place[key]
    return json.dumps(fields).encode()


def arrow_bytes(number: int) -> bytes:
    """A stream or a file, of plain or dictionary columns, packed or not."""
    kind = [pyarrow.string(), pyarrow.large_binary(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())][number % 3]
    table = pyarrow.table({"id": range(len(TEXTS)), "text": pyarrow.array(TEXTS).cast(kind)})
    sink = pyarrow.BufferOutputStream()
    options = pyarrow.ipc.IpcWriteOptions(compression="lz4" if number % 5 == 0 else None)
    with (pyarrow.ipc.new_file if number % 2 else pyarrow.ipc.new_stream)(
        sink, table.schema, options=options
    ) as writer:
        writer.write_table(table, max_chunksize=15)
    return sink.getvalue().to_pybytes()


def parquet_bytes(number: int) -> bytes:
    sink = pyarrow.BufferOutputStream()
    table = pyarrow.table({"id": range(len(TEXTS)), "text": TEXTS})
    pyarrow.parquet.write_table(
        table, sink, row_group_size=15, use_dictionary=number % 2 == 0, write_page_checksum=number % 4 == 0,
        data_page_version="2.0" if number % 3 else "1.0", compression="zstd" if number % 5 == 0 else "none",
    )  # fmt: skip
    return sink.getvalue().to_pybytes()


def read_table(form: Any, make: Callable[[int], bytes], number: int) -> None:
    data = mutated(make(number), random.Random(number))
    path = Path(f"x.{form}")
    path.write_bytes(data)
    found: list[Document] = []
    try:
        whole = FoundFile("x", path, form, len(data), 0)
        for part in divide(whole, 1) or [None]:
            found += read_documents(whole._replace(part=part), "text")
    finally:
        assert number % 5 == 0 or all(text in data for _, text in found), "foreign bytes"


def read_state(number: int) -> None:
    """The state of a dataset; beside its folder lies a file that is not its own."""
    folder = Path("dataset")
    folder.mkdir(exist_ok=True)
    for path, texts in ((folder / "data.arrow", TEXTS), (Path("secret.arrow"), [SECRET.decode()])):
        with pyarrow.ipc.new_stream(str(path), pyarrow.schema({"text": pyarrow.string()})) as writer:
            writer.write_table(pyarrow.table({"text": texts}))
    (folder / "dataset_info.json").write_text("{}")
    state = {"_data_files": [{"filename": "data.arrow"}], "_indices_data_files": None, "_split": "train"}
    (folder / "state.json").write_bytes(mutated_json(state, random.Random(number)))
    found = {text for _, text in read_corpus(["dataset"], Data())}
    assert found <= {text.encode() for text in TEXTS}, "foreign bytes"


def read_tokenizer(number: int) -> None:
    make = [bpe.byte_level, bpe.sentencepiece_like, bpe.word_pieces, bpe.unigram][number % 4]
    fields = _FIELDS.setdefault(number % 4, json.loads(make(size=330 if number % 4 < 2 else 120).to_str()))
    path = Path("tokenizer.json")
    path.write_bytes(mutated_json(fields, random.Random(number)))
    tokenizer = open_tokenizer(str(path), "[SEP]" if number % 4 == 2 else None)
    for text in (b"some text <x> 1234", "é日\r\n▁ x".encode(), b""):
        ids = tokenizer.encode(text)
        assert ids.tolist() == tokenizer.encode(text).tolist()
        assert tokenizer.bytes_of(ids) == len(tokenizer.decode(ids))
    tokenizer.export()


def read_token_file(number: int) -> None:
    """Mutated ids, index or sidecar; every other time without a sidecar, as Megatron's."""
    from test_token_file import write  # beside this file, which the child is started from

    documents = [[*(text % 256 for text in range(size, 2 * size)), 256] for size in range(0, 80, 3)]
    write(Path("x"), documents)
    path = Path(f"x.{('idx', 'json', 'bin', 'idx')[number % 4]}")
    content = path.read_bytes()
    chance = random.Random(number)
    path.write_bytes(mutated_json(json.loads(content), chance) if path.suffix == ".json" else mutated(content, chance))
    if number % 8 >= 4 and path.suffix != ".json":
        Path("x.json").unlink()
    data, tokenizer = Path("x.bin").read_bytes(), open_tokenizer("bytes")
    file = TokenFile.open("x")
    file.require_tokenizer("bytes", tokenizer)
    for packing in ("cut", "best_fit"):
        source = Source("s", (file,), tokenizer, 16, True, packing)
        for index in range(source.windows):
            window = source.window(index)
            _, packed, window_number = source.locate(index)
            at = packed.first(window_number) * file.tokens.dtype.itemsize
            assert packing == "best_fit" or data[at : at + window.nbytes] == window.tobytes(), "foreign bytes"
    if file.info is not None:
        list(describe_token_info(file.info))
        file.verify_hashes()


_FIELDS: dict[int, Any] = {}
READERS: dict[str, Callable[[int], None]] = {
    "arrow": lambda number: read_table("arrow", arrow_bytes, number),
    "parquet": lambda number: read_table("parquet", parquet_bytes, number),
    "tokenizer.json": read_tokenizer,
    "state.json": read_state,
    "token file": read_token_file,
}


def main(name: str, first: int, stop: int) -> None:
    """The child: a line for each mutation from the first on, with what came of it."""
    resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))  # a size that a file makes up is refused, not swapped for
    for number in range(first, stop):
        try:
            READERS[name](number)
            outcome = "read"
        except DataError as error:
            named = any(path in str(error) for path in ("x.", " x:", "tokenizer.json", "dataset/"))
            outcome = "refused" if named else f"unnamed: {error}"
        except BaseException:
            outcome = traceback.format_exc().replace("\n", " | ")
        print(number, outcome.encode("utf-8", "backslashreplace").decode("ascii", "replace"), flush=True)


@pytest.mark.parametrize(
    ("name", "count"),
    [("arrow", 500), ("parquet", 500), ("state.json", 500), ("token file", 500), ("tokenizer.json", 500)],
)
def test_mutations(tmp_path: Path, name: str, count: int) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(bpe.__file__).parents[1]), "RUST_BACKTRACE": "0"}
    outcomes: dict[int, str] = {}
    while len(outcomes) < count:
        words = [sys.executable, __file__, name, str(len(outcomes)), str(count)]
        child = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        lines = [line.partition(" ") for line in child.stdout.splitlines()]
        outcomes |= {int(number): said for number, _, said in lines}
        if child.returncode:
            outcomes[len(outcomes)] = f"ended with {child.returncode}: {child.stderr[-2000:]}"
    counts = Counter(said if said in ("read", "refused") else "wrong" for said in outcomes.values())
    assert counts["wrong"] == 0, {number: said for number, said in outcomes.items() if said not in ("read", "refused")}
    assert counts["read"] >= count / 20 and counts["refused"] > count / 5, counts


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
