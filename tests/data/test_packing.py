"""Packing against a reference written with Python lists."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from titanlite.corpus.units import pack
from titanlite.data.packing import Cut, document_begins, document_offsets, document_positions, offsets_size

SEPARATOR = 256
DOCUMENTS = st.lists(st.lists(st.integers(0, 255), max_size=12), max_size=12)


@settings(max_examples=100, deadline=None)
@given(documents=DOCUMENTS, length=st.integers(1, 20))
def test_windows_hold_every_target_once(documents: list[list[int]], length: int) -> None:
    stream = pack([np.array(d, np.uint16) for d in documents], SEPARATOR)
    expected = [token for document in documents for token in [*document, SEPARATOR]]
    assert stream.dtype == np.uint16
    assert stream.tolist() == expected

    cut = Cut(len(stream), length)
    windows = [cut.window(stream, w).tolist() for w in range(cut.windows)]
    assert all(len(w) == length + 1 for w in windows)
    inputs = [token for w in windows for token in w[:-1]]
    labels = [token for w in windows for token in w[1:]]
    assert inputs == expected[: len(inputs)]
    assert labels == expected[1 : len(labels) + 1]
    assert max(0, len(expected) - 1) - len(labels) < length  # what is left would not fill another window


@settings(max_examples=100, deadline=None)
@given(rows=st.integers(1, 3), length=st.integers(1, 30), data=st.data())
def test_documents_of_sequences(rows: int, length: int, data: st.DataObject) -> None:
    token = st.sampled_from([1, 2, SEPARATOR])
    inputs = [data.draw(st.lists(token, min_size=length, max_size=length)) for _ in range(rows)]
    ends = [data.draw(st.integers(0, length)) for _ in range(rows)]
    padded = [row[:end] + [SEPARATOR] * (length - end) for row, end in zip(inputs, ends, strict=True)]
    begins = document_begins(np.array(padded, np.int64), SEPARATOR, ends)
    positions, offsets = document_positions(begins), document_offsets(begins[:, None])
    assert (positions.dtype, offsets.dtype) == (np.int64, np.int32)
    for row, end, its_positions, its_offsets in zip(padded, ends, positions.tolist(), offsets.tolist(), strict=True):
        expected: list[list[int]] = []
        for place, token in enumerate(row):
            if place == 0 or (token == SEPARATOR and place <= end):
                expected.append([])
            expected[-1].append(len(expected[-1]))
        assert its_positions == [position for document in expected for position in document]
        first = [sum(map(len, expected[:index])) for index in range(len(expected) + 1)]
        assert its_offsets == first + [length] * (len(its_offsets) - len(first))


@given(microbatch=st.integers(1, 5), length=st.integers(1, 5000), documents=st.integers(0, 300))
def test_tables_of_documents_have_few_sizes(microbatch: int, length: int, documents: int) -> None:
    size = offsets_size(microbatch, length, documents)
    assert size > documents and size & (size - 1) == 0
    assert size == offsets_size(microbatch, length) or size <= 2 * documents


def test_a_document_is_seen_alone() -> None:
    """Wherever it lies in the window, a document has the layout it has when it is all there is."""
    alone = [SEPARATOR, 5, 6, 7]
    begins = document_begins(np.array([[9, 9, *alone, SEPARATOR, 8]], np.int64), SEPARATOR, [8])
    assert document_positions(begins).tolist() == [[0, 1, 0, 1, 2, 3, 0, 1]]
    assert document_offsets(begins[None]).tolist() == [[0, 2, 6, 8]]
    begins = document_begins(np.array([alone], np.int64), SEPARATOR, [4])
    assert document_positions(begins).tolist() == [[0, 1, 2, 3]]
