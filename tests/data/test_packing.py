"""Packing against a reference written with Python lists."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from titanlite.corpus.units import pack
from titanlite.data.packing import Cut, document_layout

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
def test_document_layout(rows: int, length: int, data: st.DataObject) -> None:
    token = st.sampled_from([1, 2, SEPARATOR])
    inputs = [data.draw(st.lists(token, min_size=length, max_size=length)) for _ in range(rows)]
    positions, documents = document_layout(np.array(inputs, np.int64), SEPARATOR)
    assert positions.dtype == documents.dtype == np.int64
    for row, its_positions, its_documents in zip(inputs, positions.tolist(), documents.tolist(), strict=True):
        position, document = -1, 0
        for token, its_position, its_document in zip(row, its_positions, its_documents, strict=True):
            position, document = (0, document + 1) if token == SEPARATOR else (position + 1, document)
            assert (its_position, its_document) == (position, document)


def test_a_document_is_seen_alone() -> None:
    """Wherever it lies in the window, a document has the layout it has when it is all there is."""
    alone = [SEPARATOR, 5, 6, 7]
    positions, documents = document_layout(np.array([9, 9, *alone, SEPARATOR, 8], np.int64), SEPARATOR)
    assert positions.tolist() == [0, 1, 0, 1, 2, 3, 0, 1]
    assert documents.tolist() == [0, 0, 1, 1, 1, 1, 2, 2]
    assert document_layout(np.array(alone, np.int64), SEPARATOR)[0].tolist() == [0, 1, 2, 3]
