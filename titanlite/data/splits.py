"""What `[data]` names, opened: training samples by number, and the sets that validation reads. No torch."""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from pathlib import Path

import xxhash

from titanlite.corpus.token_file import TokenFile
from titanlite.corpus.tokenizers import Tokenizer, Tokens, tokenizer_of
from titanlite.data.fill_in import FilledIn, fill_in
from titanlite.data.memory import within_memory
from titanlite.data.mixture import MixtureSchedule, build_schedule
from titanlite.data.order import sample_position
from titanlite.data.packing import Stream
from titanlite.data.sources import Source, Texts, open_streams
from titanlite.errors import DataError
from titanlite.recipe.sections import Data, DataSource, Packing
from titanlite.text import format_count

ONLY_SOURCE = "corpus"  # name of the source that `data.corpus` is; not its path: a corpus that moves keeps its order


@dataclass(frozen=True)
class Split:
    """The training samples of a run."""

    sources: tuple[Source, ...]
    schedule: MixtureSchedule
    seed: int

    @property
    def windows(self) -> int:
        return sum(each.windows for each in self.sources)

    @property
    def tokens(self) -> int:
        return sum(each.tokens for each in self.sources)

    def past(self, samples: int) -> dict[str, str]:
        """Equal for splits whose first `samples` samples are: 64 bits each of the `order`, and of the text of every
        source that they are of (`text/NAME`). What is to come later may differ.
        """
        names = [each.name for each in self.sources]
        before = self.schedule.before(samples)
        parts = [(first, [names[k] for k in shares], tuple(shares.values())) for first, shares in before]
        read = [each for each, count in zip(self.sources, self.schedule.counts(samples), strict=True) if count]
        sizes = [(each.name, each.windows, each.packing, each.sequence_length) for each in read]
        order = xxhash.xxh3_64_hexdigest(repr((self.seed, parts, sizes)).encode())
        return {"order": order, **{f"text/{each.name}": each.fingerprint for each in read}}

    def sample(self, number: int) -> Tokens:
        """Inputs and labels of sample `number` of the run (from 0, over all epochs), as `Source.window` has them."""
        source, window = self.place(number)
        return source.window(window)

    def place(self, number: int) -> tuple[Source, int]:
        """The source of sample `number`, and which of its windows it is."""
        if self.schedule.end is not None and number >= self.schedule.end:
            what = f"sample {number}: the sources are used up after {self.schedule.end} samples (a run that went back"
            raise DataError(f"{what} has read others instead); raise their limits or shorten the run")
        chosen, turn = self.schedule(number)
        source = self.sources[chosen]
        return source, sample_position(turn, source.windows, self.seed, source.name)


@dataclass(frozen=True)
class DataSplits:
    train: Split
    validation: tuple[Source, ...]
    tokenizer: Tokenizer

    @property
    def validation_texts(self) -> dict[str, str]:
        """Fingerprints of the validation sets, as `Split.past` has those of the sources."""
        return {f"validation/{each.name}": each.fingerprint for each in self.validation}

    @property
    def token_files(self) -> list[TokenFile]:
        """Those that training and validation read, each once."""
        streams = [stream for source in (*self.train.sources, *self.validation) for stream in source.streams]
        files = [stream.stream if isinstance(stream, FilledIn) else stream for stream in streams]
        return [*{file.prefix.resolve(): file for file in files if isinstance(file, TokenFile)}.values()]

    @property
    def fingerprint(self) -> int:
        """63 bits: equal where all that training and validation read is, if the recipes are."""
        texts = " ".join(f"{each.name} {each.fingerprint}" for each in (*self.train.sources, *self.validation))
        return xxhash.xxh3_64_intdigest(texts.encode()) >> 1


def split_of(
    tokens: Tokens,
    tokenizer: Tokenizer,
    sequence_length: int,
    document_mask: bool = False,
    seed: int = 0,
    packing: Packing = "cut",
) -> Split:
    """Training samples of one stream in memory; for best-fit packing it ends with the separator."""
    texts = (Texts(tokens, tokenizer.separator),)
    source = Source(ONLY_SOURCE, texts, tokenizer, sequence_length, document_mask, packing)
    return Split((source,), build_schedule([(None, (1.0,))], [None]), seed)


def open_data(
    section: Data, sequence_length: int, seed: int, *, validated: bool = True, texts_folder: Path | None = None
) -> DataSplits:
    """Open the sources and, if `validated`, the validation sets: those that `data.validation` names or else the
    sources' held-out parts. `texts_folder`: as `open_streams` has it. Raises `DataError`, also for a source or set that
    is shorter than one sequence.
    """
    tokenizer = tokenizer_of(section)
    sources: list[Source] = []
    sets: list[Source] = []

    def add(to: list[Source], name: str, streams: tuple[Stream, ...], what: str, fix: str = "") -> None:
        source = Source(name, streams, tokenizer, sequence_length, section.document_mask, section.packing)
        if source.windows == 0:
            raise DataError(
                f"{what} has {source.tokens:,} tokens, and one sequence takes {sequence_length + 1:,} "
                f"(training.sequence_length and one to predict); give more text, or shorter sequences{fix}."
            )
        to.append(source)

    for name, paths, key in named_sources(section):
        with within_memory(what := f"{key} = {paths!r}"):
            training, held_out = open_streams(paths, key, section, tokenizer, texts_folder=texts_folder)
            if section.fim_rate:
                training = fill_in(training, section.fim_rate, section.fim_tokens, tokenizer, seed, name)
            add(sources, name, training, f"{what}: its training part", ", or a lower data.validation_percent")
            if validated and not section.validation and held_out:
                add(sets, name, held_out, f"{what}: its validation part", ", or a higher data.validation_percent")
    for name, paths, key in named_sets(section) if validated else ():
        with within_memory(what := f"{key} = {paths!r}"):
            streams, _ = open_streams(paths, key, section, tokenizer, hold_out=False, texts_folder=texts_folder)
            add(sets, name, streams, f"{what}: it")
    if validated and not sets:
        raise DataError(
            "validation.every_steps: there is nothing to validate on: no source has a held-out part. Name a set by "
            "[[data.validation]], prepare token files with --held-out, or set validation.every_steps = 0."
        )
    return DataSplits(Split(tuple(sources), _schedule(section, sources), seed), tuple(sets), tokenizer)


def require_samples(split: Split, samples: int) -> list[str]:
    """Lines about the sources of a run of `samples` samples: how often each is read, where there are several or one is
    read more than once, and what best-fit packing makes of each. Raises `DataError` where they do not suffice.
    """
    end, length = split.schedule.end, split.sources[0].sequence_length
    if end is not None and end < samples:
        raise DataError(
            f"data.sources: all that may be read is {format_count(end * length)} tokens, and the run needs "
            f"{format_count(samples * length)}; train on fewer (training.tokens), raise or remove the sources' epochs "
            "and tokens, or add a source."
        )
    lines = [report for source in split.sources if (report := source.packing_report())]
    for source, count in zip(split.sources, split.schedule.counts(samples), strict=True):
        times = count / source.windows
        if len(split.sources) > 1 or times > 1:
            size = format_count(source.tokens)
            lines.append(f"source {source.name} ({size} tokens) will be read {times:,.{2 if times < 10 else 0}f} times")
    return lines


def compression_baselines(source: Source, limit_bytes: int = 4 * 2**20) -> dict[str, float]:
    """Bits per byte that `gzip -9` and `xz -9` need for the source's documents; empty for no text."""
    # The beginning stands for the whole: xz takes about half a second a MiB.
    text = source.tokenizer.decode(source.beginning(limit_bytes))[:limit_bytes]
    compressed = {"gzip -9": gzip.compress(text, 9), "xz -9": lzma.compress(text, preset=9)} if text else {}
    return {name: 8 * len(data) / len(text) for name, data in compressed.items()}


def named_sources(section: Data) -> list[tuple[str, list[str], str]]:
    """Each source's name, its paths, and their key in the recipe."""
    if not section.sources:
        return [(ONLY_SOURCE, _as_list(section.corpus or "python-stdlib"), "data.corpus")]
    return [(each.name, _as_list(each.path), f"data.sources.{i}.path") for i, each in enumerate(section.sources)]


def named_sets(section: Data) -> list[tuple[str, list[str], str]]:
    """The same of the validation sets that are named."""
    return [(each.name, _as_list(each.path), f"data.validation.{i}.path") for i, each in enumerate(section.validation)]


def _as_list(path: str | list[str]) -> list[str]:
    return [path] if isinstance(path, str) else path


def _schedule(section: Data, sources: Sequence[Source]) -> MixtureSchedule:
    """By weights, or sizes where none are given."""
    if not section.sources:
        return build_schedule([(None, (1.0,))], [None])
    length, pairs = sources[0].sequence_length, list(zip(section.sources, sources, strict=True))
    stages: list[tuple[int | None, list[float]]] = [
        (stage.until and stage.until // length, [stage.weights.get(each.name, 0.0) for each in sources])
        for stage in section.stages
    ]
    own = [named.weight or each.windows for named, each in pairs]
    return build_schedule(stages or [(None, own)], [_limit(named, each) for named, each in pairs])


def _limit(named: DataSource, source: Source) -> int | None:
    """Samples that may be read of a source."""
    epochs = None if named.epochs is None else floor(Fraction(str(named.epochs)) * source.windows)
    tokens = None if named.tokens is None else named.tokens // source.sequence_length
    limits = [limit for limit in (epochs, tokens) if limit is not None]
    if 0 in limits:
        raise DataError(
            f"source {named.name}: its epochs and tokens allow not one sequence of {source.sequence_length} tokens "
            f"({source.windows} are there); raise them, or leave the source out."
        )
    return min(limits, default=None)
