"""What `[data]` names, opened: a training and a validation split that answer 'tokens of sample i'.

No torch here, and no batches: those are the loader's.
"""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from titanlite.data.corpora import is_held_out, read_corpus
from titanlite.data.order import sample_position
from titanlite.data.packing import pack, window, window_count
from titanlite.data.tokenizers import Ids, Tokenizer, Tokens, token_dtype, tokenizer_of
from titanlite.errors import DataError
from titanlite.recipe.sections import Data

_SOURCE = "corpus"
"""Key of the one source's order. Not its path: a corpus that moves keeps its order."""


@dataclass(frozen=True)
class Split:
    """One side of a corpus, as a stream of tokens cut into windows (see `packing`)."""

    name: str
    """`training` or `validation`."""
    stream: Tokens
    """Every document followed by a separator, flat."""
    tokenizer: Tokenizer
    sequence_length: int
    document_mask: bool
    """Batches carry positions and document numbers."""
    seed: int
    """Seed of the order of samples."""

    @property
    def windows(self) -> int:
        """How many sequences there are; as many samples make an epoch."""
        return window_count(len(self.stream), self.sequence_length)

    @property
    def fingerprint(self) -> str:
        """Hash of every token in its place: equal where all samples are."""
        return xxhash.xxh3_64_hexdigest(self.stream.data)

    @property
    def documents(self) -> int:
        return int(np.count_nonzero(self.stream == self.tokenizer.separator))

    def window(self, index: int) -> Tokens:
        """Inputs and labels of window `index`, `[sequence_length + 1]`; a view."""
        return window(self.stream, index, self.sequence_length)

    def sample(self, number: int) -> Tokens:
        """Inputs and labels of sample `number` of the run (from 0, over all epochs), `[sequence_length + 1]`."""
        return self.window(sample_position(number, self.windows, self.seed, _SOURCE))


@dataclass(frozen=True)
class DataSplits:
    """The corpus of a run."""

    train: Split
    validation: Split
    tokenizer: Tokenizer


def open_data(section: Data, sequence_length: int, seed: int, *, validated: bool = True) -> DataSplits:
    """Read and tokenise the corpus, and hold out its validation part.

    Documents are held out by a hash of their names, so the seed, the order of the files and the other files there
    do not matter. A corpus of so few documents that one side would get none (a single text file, say) is cut
    through its documents instead: the last `validation_percent` of each is held out.

    Raises `DataError`: what cannot be read, or a training split (if `validated`, also a validation split) that is
    shorter than one sequence.
    """
    tokenizer = tokenizer_of(section)
    kept: list[Ids] = []
    held: list[Ids] = []
    for document in read_corpus(section):
        side = held if is_held_out(document.name, section.validation_percent) else kept
        try:
            side.append(tokenizer.encode(document.content))
        except DataError as error:
            raise DataError(f"{document.name}: {error}") from None
    if not kept and not held:
        raise DataError(f"data.corpus = {section.corpus!r} holds no text at all; give one with text in it.")
    if not kept or not held:
        kept, held = _cut_each(kept or held, section.validation_percent)

    def split(name: str, documents: Sequence[Ids]) -> Split:
        stream = pack(documents, tokenizer.separator, token_dtype(tokenizer.vocab_size))
        return Split(name, stream, tokenizer, sequence_length, section.document_mask, seed)

    splits = DataSplits(split("training", kept), split("validation", held), tokenizer)
    for part in (splits.train, splits.validation) if validated else (splits.train,):
        if part.windows == 0:
            raise DataError(
                f"data.corpus = {section.corpus!r}: its {part.name} split has {len(part.stream):,} tokens, and one "
                f"sequence takes {sequence_length + 1:,} (training.sequence_length and one to predict); give more "
                f"text, or shorter sequences, or {_other_share(part)}."
            )
    return splits


def compression_baselines(split: Split, limit_bytes: int = 4 * 2**20) -> dict[str, float]:
    """Bits per byte that `gzip -9` and `xz -9` need for the split's text, its documents in one stream.

    Anything that has learnt the text should need fewer. Of long splits, the first `limit_bytes` stand for the
    whole: xz takes about half a second a MiB.
    """
    text = split.tokenizer.decode(split.stream[:limit_bytes])[:limit_bytes]
    gzip = zlib.compressobj(9, wbits=31)  # 31: with gzip's own header and checksum
    sizes = {
        "gzip -9": len(gzip.compress(text)) + len(gzip.flush()),
        "xz -9": len(lzma.compress(text, preset=9)),
    }
    return {name: 8 * size / len(text) for name, size in sizes.items()}


def _cut_each(documents: Sequence[Ids], percent: float) -> tuple[list[Ids], list[Ids]]:
    """The beginnings and the last `percent` of the tokens of each document; empty pieces left out."""
    cuts = [len(document) - round(len(document) * percent / 100) for document in documents]
    pairs = list(zip(documents, cuts, strict=True))
    return [d[:cut] for d, cut in pairs if cut], [d[cut:] for d, cut in pairs if cut < len(d)]


def _other_share(split: Split) -> str:
    return f"a {'lower' if split.name == 'training' else 'higher'} data.validation_percent"
