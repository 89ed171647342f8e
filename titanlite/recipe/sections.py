"""What a recipe can hold: one pydantic model a section, each key with its meaning beside it.

The docstring under each field is the documentation: `titanlite check --explain`, `docs/recipe.md` and the
JSON schema are made from it. Rules that need more than one key live in `titanlite/plan/rules`.
"""

from __future__ import annotations

import fractions
import functools
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, WithJsonSchema, create_model

from titanlite.recipe.paths import check_name, check_path


def fits_64_bits(value: int) -> int:
    """`value` as it is. Raises `ValueError` where TOML's integers, and torch's, end."""
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{value} does not fit into 64 bits; write a smaller number.")
    return value


def parse_count(value: Any) -> Any:
    """An integer for a string such as `"2_000_000"`, `"2.5M"` or `"100B"`; other values as they are, for the schema to
    refuse. Raises `ValueError` for a string that is no whole count."""
    if not isinstance(value, str):
        return value
    if match := re.fullmatch(r"([0-9][0-9_]{,99}(?:\.[0-9]{1,99})?)\s*([KMBT]?)", value.strip()):
        count = fractions.Fraction(match[1].replace("_", "")) * 1000 ** " KMBT".index(match[2] or " ")
        if count.denominator == 1:
            return int(count)
    raise ValueError(f"'{value[:60]}' is not a count; write a whole number, or one with K, M, B or T such as '2.5M'")


_COUNT_SCHEMA = {
    "anyOf": [
        {"type": "integer", "minimum": 1},
        {"type": "string", "pattern": r"^[0-9][0-9_]*(\.[0-9]+)?\s*[KMBT]?$", "examples": ["100B"]},
    ]
}
Positive = Annotated[int, Field(ge=1), AfterValidator(fits_64_bits)]
Count = Annotated[Positive, BeforeValidator(parse_count), WithJsonSchema(_COUNT_SCHEMA)]  # may be written as "100B"
NonNegative = Annotated[int, Field(ge=0), AfterValidator(fits_64_bits)]
PositiveFloat = Annotated[float, Field(gt=0)]
Epsilon = Annotated[float, Field(gt=0, le=1)]  # what is larger would be all that counts: it would train nothing
NonNegativeFloat = Annotated[float, Field(ge=0)]
Seconds = Annotated[float, Field(gt=0, le=1e9)]  # threads and process groups cannot wait for much longer
SecondsOrNever = Annotated[float, Field(ge=0, le=1e9)]
Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[tuple[Text, ...], Field(strict=False)]
NonNegatives = Annotated[tuple[NonNegative, ...], Field(strict=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
DecayRate = Annotated[float, Field(ge=0, lt=1)]
PathText = Annotated[str, Field(min_length=1, json_schema_extra={"format": "path"}), AfterValidator(check_path)]
"""Every path, and names such as `bytes` in place of one."""
Paths = PathText | Annotated[list[PathText], Field(min_length=1)]
FolderName = Annotated[str, Field(min_length=1), AfterValidator(check_name)]


class Section(BaseModel, extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True):
    """Strict and closed: an unknown key, a string for a number or a NaN is an error, never a guess."""


class Run(Section):
    """What the run is called, where it writes, and what fixes its randomness."""

    name: FolderName = "run"
    """Name of the run; its folder is `output_dir/name`."""
    output_dir: PathText = "runs"
    """Folder that holds run folders; relative to where the command is started, `~` is your home, as in every path."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the initial weights and of the data order."""
    deterministic: bool = False
    """Use only deterministic algorithms: a second run on the same machine gives the same bits. Slower on GPUs."""
    stop_after_step: Positive | None = Field(None, examples=[1000])
    """Save and stop (exit code 75) once this step is done; the schedule is that of the whole run."""
    stop_after_minutes: Seconds | None = Field(None, examples=[55.0])
    """Save and stop (exit code 75) once this process has trained for this many minutes."""


class RopeScaling(Section):
    """Llama 3.1's rule for stretching the rotary frequencies to a longer context."""

    factor: PositiveFloat = 8.0
    """By how much the wavelengths past the low-frequency bound are stretched."""
    low_freq_factor: PositiveFloat = 1.0
    """Wavelengths above `original_context / low_freq_factor` are stretched in full."""
    high_freq_factor: PositiveFloat = 4.0
    """Wavelengths below `original_context / high_freq_factor` are kept as they are."""
    original_context: Positive = 8192
    """Context length, in tokens, that the model was first trained at."""


class Model(Section):
    """Architecture. A preset gives every size; a key set beside it replaces the preset's value."""

    preset: Text = "custom"
    """Named architecture: debug, 30m, 125m, 350m, llama3.2-1b, llama3.2-3b, llama3-8b, llama3-70b, llama3.1-405b; or
    custom, a plain Llama of the sizes below."""
    dim: Positive | None = Field(None, examples=[768])
    """Width of the residual stream; custom: 128."""
    layers: Annotated[int, Field(ge=1, le=10_000)] | None = Field(None, examples=[12])
    """Number of transformer blocks; custom: 4."""
    heads: Positive | None = Field(None, examples=[12])
    """Number of query heads; `dim / heads` is the head size, and must be even; custom: 4."""
    kv_heads: Positive | None = Field(None, examples=[4])
    """Number of key and value heads; must divide `heads` (grouped-query attention); custom: as many as `heads`."""
    ffn_dim: Positive | None = Field(None, examples=[2048])
    """Inner width of the SwiGLU feed-forward network; custom: 8/3 of `dim`, rounded up to a multiple of 128."""
    vocab_size: Positive | None = Field(None, examples=[512])
    """Rows of the embedding; at least the tokenizer's vocabulary, and may be padded above it; custom: 272."""
    rope_theta: PositiveFloat | None = Field(None, examples=[500_000.0])
    """Base of the rotary frequencies; custom: 500,000."""
    rope_scaling: RopeScaling | None = Field(None, examples=[{"factor": 8.0, "original_context": 8192}])
    """Llama 3.1's frequency scaling; absent: the preset's, or none."""
    norm_eps: Epsilon | None = Field(None, examples=[1e-5])
    """Epsilon inside every RMSNorm, at most 1; custom: 1e-5."""
    tie_embeddings: bool | None = Field(None, examples=[True])
    """Share one matrix between the embedding and the output head; custom: false."""
    qk_norm: bool | None = Field(None, examples=[True])
    """RMSNorm over each query and key head before the rotation, as in Qwen 3; custom: false."""
    window: NonNegative | Annotated[NonNegatives, Field(min_length=1)] | None = Field(None, examples=[[1024, 0]])
    """Sliding window: how many tokens a token attends to, itself and those just before it; 0: all. A list is by layer
    and repeated: `[1024, 1024, 0]` attends to all in every third layer; custom: 0."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the initial matrices and embeddings."""
    depth_scaled_init: bool = True
    """Divide `init_std` by sqrt(2 * layers) for the matrices that write to the residual stream (GPT-2, section 2.3)."""


Packing = Literal["cut", "best_fit"]
_SOURCES = [{"name": "web", "path": "texts/web", "weight": 0.9}, {"name": "wiki", "path": "wiki.jsonl", "weight": 0.1}]
_FIM_TOKENS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")


class DataSource(Section):
    """A part of the training data, with a weight of its own."""

    name: FolderName
    """What it is called; its order of samples hangs on the name, not on the path."""
    path: Paths
    """What `data.corpus` takes, or a token file of `titanlite data prepare`."""
    weight: PositiveFloat | None = None
    """Its share of the samples, relative to the others'; for all sources or for none: then sizes give the shares."""
    epochs: PositiveFloat | None = None
    """Read it at most this many times; then the others share its part."""
    tokens: Count | None = None
    """Read at most this many of its tokens, counted over all epochs."""


class DataStage(Section):
    """A stretch of the run in which sources have other weights."""

    until: Count | None = None
    """Tokens of the run after which the next stage begins; the last stage has none."""
    weights: dict[Text, PositiveFloat]
    """Weight by source; a source that is not named has no part."""


class ValidationSet(Section):
    """Text that validation reads, and training does not."""

    name: FolderName
    """What its losses are called."""
    path: Paths
    """What `data.corpus` takes, or a token file of `titanlite data prepare`; all of it is read."""


class Data(Section):
    """What is read, in which order, and how it becomes sequences."""

    corpus: Paths | None = Field(None, examples=[["texts/*.txt", "more/pages.jsonl"]])
    """`python-stdlib` (the source of the Python that runs; used if there are no `sources` either), or a path, a glob or
    a list of them, relative to where the command is started: text files (one document each), JSON lines (one document
    a line), Parquet files, folders of these, or token files of `titanlite data prepare` (`PREFIX`)."""
    sources: list[DataSource] = Field([], max_length=999, examples=[_SOURCES])
    """Instead of `corpus`: several sources, each a `[[data.sources]]`, mixed by weight in any thousand samples."""
    stages: list[DataStage] = Field([], examples=[[{"until": "50B", "weights": {"web": 9}}, {"weights": {"wiki": 1}}]])
    """Weights that change during the run, each a `[[data.stages]]`, instead of the sources' own."""
    validation: list[ValidationSet] = Field([], examples=[[{"name": "news", "path": "news.jsonl"}]])
    """Validation sets, each a `[[data.validation]]`; absent: the held-out part of each source."""
    tokenizer: PathText = Field("bytes", examples=["path/to/tokenizer.json"])
    """`bytes` (the 256 byte values, and 256 between documents), or a path: a `tokenizer.json` of Hugging Face's
    `tokenizers`, a rank file such as Llama 3's `tokenizer.model`, or a folder that holds one."""
    separator: Text | None = Field(None, examples=["<|end_of_text|>"])
    """Special token that stands between documents; absent: the one that ends a text by the tokenizer's files."""
    special_tokens: list[Text] = Field([], examples=[["<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"]])
    """Special tokens that get ids after the tokenizer's own; after a rank file's ranks, instead of Llama 3's."""
    text_key: Text = "text"
    """Field of a JSONL line that holds its text."""
    validation_percent: Annotated[float, Field(ge=0, lt=100)] = 4.0
    """Share of the files (JSONL: lines) held out for validation, chosen by a hash of their name (line), also where
    `validation` names other texts: set 0 then."""
    packing: Packing = "cut"
    """How documents become sequences: `cut` lays them end to end and cuts; `best_fit` puts together those that fit, so
    that none is cut but what is longer than a sequence, and pads what is left (the tokens of a run include padding)."""
    fim_rate: Fraction = 0.0
    """Share of the training documents that are cut at two places and read as prefix, suffix, middle, each after its
    token of `fim_tokens`, so that the model learns to fill in (Bavarian et al. 2022)."""
    fim_tokens: Annotated[tuple[Text, Text, Text], Field(strict=False)] = _FIM_TOKENS
    """Special tokens of the tokenizer (see `special_tokens`) that stand before prefix, suffix and middle."""
    document_mask: bool = False
    """Keep attention inside documents, and count positions from each document's start."""
    skip_steps: list[Positive] = Field([], examples=[[1200, 1201]])
    """Batches to pass over, by the steps that would read them if the run passed over none and never went back; the next
    one is taken instead. May be changed when a run is resumed."""
    workers: Annotated[int, Field(ge=0, le=1024)] = 0
    """Worker processes that assemble batches; 0 assembles them in the trainer's own process."""
    prefetch: Annotated[int, Field(ge=1, le=1024)] = 2
    """Batches each worker keeps ready (only with `workers` above 0)."""


class Training(Section):
    """How much is trained, in what portions."""

    steps: Positive | None = Field(None, examples=[1000])
    """Optimizer steps of the run; give this or `tokens`."""
    tokens: Count | None = Field(None, examples=["100B"])
    """Tokens of the run, such as 2_000_000 or "100B", rounded up to whole steps; give this or `steps`."""
    sequence_length: Positive = 256
    """Tokens in one sequence."""
    global_batch: Positive = 32
    """Sequences in one optimizer step, over all devices; never changes with the layout."""
    microbatch: Positive | None = Field(None, examples=[8])
    """Sequences in one forward pass on one device; absent: a device's whole share in one pass."""


class Validation(Section):
    """Loss on held-out data."""

    every_steps: NonNegative = 0
    """Steps between two validations; the last step is validated too. 0: never."""
    sequences: Positive = 128
    """Sequences in one validation, spread evenly over the held-out data; the same ones each time."""


class Optimizer(Section):
    """The update rule."""

    name: Text = "adamw"
    """`adamw`, or `muon`: Muon for the matrices inside the blocks, AdamW for the rest."""
    lr: PositiveFloat = 3e-4
    """Peak learning rate of AdamW's parameters."""
    betas: Annotated[tuple[DecayRate, DecayRate], Field(strict=False)] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moments."""
    eps: Epsilon = 1e-8
    """Added to AdamW's denominator; at most 1."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay (times the learning rate) of matrices; norms and other vectors have none."""
    clip_norm: NonNegativeFloat = 1.0
    """Gradients are scaled down to this global norm; 0: no clipping."""
    muon_lr: PositiveFloat = 0.02
    """Peak learning rate of Muon's matrices, times sqrt(rows / columns) where a matrix has more rows than columns."""
    muon_momentum: DecayRate = 0.95
    """Decay rate of Muon's Nesterov momentum."""


class Schedule(Section):
    """Learning rate over the run: warm-up, then the named shape, as a factor on the peak rates."""

    name: Text = "cosine"
    """`constant`, `linear`, `cosine`, `sqrt` (inverse square root) or `wsd` (warm-up, stable, decay)."""
    warmup_steps: NonNegative = 0
    """Steps of linear warm-up from 0."""
    decay_steps: Positive | None = Field(None, examples=[200])
    """Steps of decay at the end (linear, cosine: from the end of warm-up if absent; wsd: the last 20 % if absent)."""
    decay_shape: Literal["linear", "cosine", "sqrt"] = "linear"
    """Shape of wsd's decay; `sqrt` is one minus the square root of the progress (Hägele et al. 2024)."""
    final_lr_ratio: Fraction = 0.0
    """Learning rate at the end, over the peak."""


class Pipeline(Section):
    """How the stages of a pipeline take turns; for `parallel.pp` above 1."""

    schedule: Literal[
        "GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"
    ] = "1F1B"
    """Order of passes. The first two have a stage a rank, ZBVZeroBubble and DualPipeV two, others `stages_per_rank`."""
    microbatches: Positive | None = Field(None, examples=[16])
    """Passes that a rank's share of the batch is cut into; absent: by `training.microbatch`, or one sequence each."""
    stages_per_rank: Annotated[int, Field(ge=2)] = 2
    """Stages on each rank in the interleaved schedules; more of them idle less and communicate more."""
    blocks_per_stage: NonNegatives | None = Field(None, examples=[[7, 8, 8, 9]])
    """Transformer blocks of each stage, first to last; absent: balanced by operations, the head's counted too."""


class Parallel(Section):
    """How the devices share the work. The degrees multiply to the number of ranks."""

    dp_replicate: Positive = 1
    """Copies of the (sharded) model, each with its share of the global batch; above 1 with `dp_shard`: HSDP."""
    dp_shard: Annotated[int, Field(ge=-1)] = -1
    """Ranks that each model copy is cut over, as `zero_stage` says; -1: all the ranks that are left."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 2
    """What is cut over `dp_shard` x `cp`: 0 nothing, 1 optimizer states, 2 also gradients, 3 also weights."""
    cp: Positive = 1
    """Ranks that share each sequence (context parallel)."""
    tp: Positive = 1
    """Ranks that share each matrix, and the sequence between matrices (tensor and sequence parallel)."""
    pp: Positive = 1
    """Ranks that the blocks are dealt out to, one after the other (pipeline parallel)."""
    ep: Positive = 1
    """Ranks that a model's experts are dealt out to (expert parallel): those of `tp`, then of `cp` and `dp_shard`."""
    pipeline: Pipeline = Pipeline()
    cp_method: Literal["all-gather", "ring"] = "all-gather"
    """How queries meet other ranks' keys: gathered once a block, or passed round (less memory, more messages)."""
    async_tp: bool = False
    """Overlap the products of tensor parallelism with its communication; needs `compile`, and NVLink between ranks."""
    prefetch: NonNegative = 1
    """Blocks whose weights are asked for ahead of the one at work; 0: FSDP2's own order, one ahead in backward."""
    offload: bool = False
    """Keep weights, gradients and optimizer states in the host's memory, and update there (Muon: on the device), if
    they do not fit on it."""
    timeout_seconds: Seconds = 600.0
    """A rank that waits longer than this for others ends the run, also while these save or load."""


class Float8(Section):
    """Matrix products in float8; weights, gradients and what is between the products stay as they are."""

    enabled: bool = False
    """Form the products of linear layers in float8: on GPUs from compute capability 8.9 on in half the time."""
    recipe: Literal["tensorwise", "rowwise", "rowwise_with_hp_grad_weight", "mxfp8"] = "tensorwise"
    """`tensorwise`: one scale a tensor, gradients in e5m2 (the fastest); `rowwise`: one a row or column, all in e4m3;
    `rowwise_with_hp_grad_weight`: the same, but gradients of weights in the compute dtype (the most exact); `mxfp8`:
    one for each 32 numbers, for GPUs of compute capability 10.0 (Blackwell); emulated elsewhere, slowly."""
    exclude: Texts = ("head",)
    """Names of linears that stay as they are, or patterns such as `layers.*.attention.wo`; replaces the default."""
    all_gather: bool = False
    """Gather converted weights in float8, and over `tp` what their linears take, where no later cast loses by that
    (`tensorwise`; of `rowwise_with_hp_grad_weight` the weights): half bfloat16's bytes; each rank scales its rows."""
    min_size: NonNegative = 1024
    """Linears of 2 x outputs x inputs / (outputs + inputs) below this stay: casts take longer than float8 saves."""


class Precision(Section):
    """Number formats."""

    compute: Literal["bfloat16", "float32", "float64"] = "bfloat16"
    """Matrix products and activations; weights, sums and optimizer states stay at least float32."""
    reduce: Literal["bfloat16", "float32"] = "float32"
    """Gradients on their way between data ranks; bfloat16 halves the bytes and rounds, also what adds up on a rank
    before it is sent. In float64 runs, float64."""
    float8: Float8 = Float8()


Keep = Literal["attention", "every_second_product", "products"]


class Recompute(Section):
    """Activations that are computed a second time in the backward pass, instead of kept."""

    mode: Literal["none", "selective", "full"] = "none"
    """`full`: a block keeps only its input; `selective`: also what `keep` says."""
    keep: Keep = "every_second_product"
    """What `selective` keeps: `attention`'s results, and what tensor parallel ranks have summed; and of the block's
    matrix products the results of all (`products`), or of every second one (`every_second_product`)."""
    every: Positive = 1
    """Recompute one block in this many; 1: all."""
    budget: Annotated[float, Field(gt=0, lt=1)] | None = Field(None, examples=[0.5])
    """Part of the activations that the compiler may keep, recomputing the cheapest; with `compile`, without `mode`."""


class Kernels(Section):
    """Which of a model's operations run as fused kernels. On a CPU they are PyTorch's own."""

    backend: Literal["auto", "triton", "torch"] = "auto"
    """`triton`: one Triton kernel an operation, forward and backward; `torch`: PyTorch's operations; `auto`: Triton on
    a GPU, but for what `compile` fuses by itself."""
    rms_norm: Text | None = Field(None, examples=["triton"])
    """The same for RMSNorm alone; or the name of a plugin's kernel."""
    rope: Text | None = Field(None, examples=["torch"])
    """Likewise for the rotation of queries and keys."""
    swiglu: Text | None = Field(None, examples=["torch"])
    """Likewise for silu(gate) x up."""
    attention: Literal["auto", "cudnn", "flash"] = "auto"
    """Attention: `flash` (FlashAttention, the newest that is installed), `cudnn`, which takes whole sequences alone, or
    `auto`: cuDNN where it can, else FlashAttention. In float32 and float64, GPUs run PyTorch's, or slow products."""
    float8_quantise: Literal["auto", "triton", "torch"] | None = Field(None, examples=["torch"])
    """`auto`, `triton` or `torch` for the casts of `precision.float8`."""
    linear_cross_entropy: Literal["auto", "torch", "off"] = "auto"
    """The head with its loss: `off` forms all logits of a microbatch at once; the others a chunk at a time, in far less
    memory: `auto` where all would take more than 64 MiB, with Triton on GPUs; `torch` always, without Triton."""


class Compile(Section):
    """torch.compile."""

    enabled: bool = False
    """Compile each transformer block, and the head with its loss unless that takes chunks, which compiled code would
    need more memory for."""


class Checkpoint(Section):
    """What is saved, and when; and what a new run begins with."""

    every_steps: NonNegative = 0
    """Steps between two saves; 0: only at the end, and when the run is stopped."""
    every_minutes: SecondsOrNever = 0.0
    """Save also when this many minutes have passed since the last save, by the first rank's clock; 0: never."""
    mode: Literal["async", "sync"] = "async"
    """`async`: training stops while the state is copied to the host's memory, and goes on while that is written;
    `sync`: it stops until all is written, and no memory is taken."""
    keep_last: NonNegative = 2
    """Number of newest checkpoints to keep; older ones are deleted once a newer one is committed. 0: keep all."""
    keep_every: NonNegative = 0
    """Of the older ones, keep those whose step is a multiple of this; 0: none."""
    keep_best: NonNegative = 0
    """Number to keep of older ones saved right after a validation, by its loss (of several sets, the first one's)."""
    max_failures: NonNegative = 3
    """Saves that may fail in a row (a full disk, say) before the run ends; each is tried again, a while later."""
    warm_start: PathText | None = Field(None, examples=["runs/base"])
    """Weights that a new run begins with: a run folder, or one of its checkpoints (`runs/base/500`), of any layout and
    number format. Step, data, schedule and optimizer begin anew."""
    resume_from: PathText | None = Field(None, examples=["runs/base/500"])
    """As `warm_start`, but the whole state: it goes on from that step; the recipe may differ as a resumed run's may."""


WATCHDOG_PATIENCE = 4  # how much longer than a step may what no step before has shown: compiling, saving, …
LONGEST_SPIKE_WINDOW = 1024  # checkpoints hold as many steps of history, whatever the recipe's window


class Resilience(Section):
    """What happens when something goes wrong."""

    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """A step whose loss or gradient norm is not finite is never applied. `stop` then ends the run (exit code 3);
    `skip` goes on, up to `max_skips`; `rollback` goes back to the newest checkpoint and past the samples that were read
    since, up to `max_rollbacks`. Weights and moments that are not finite are never saved: `stop` and `skip` end the
    run. For a validation loss that is not finite, `skip` goes on, and `stop` saves the state first."""
    on_spike: Literal["off", "stop", "skip", "rollback"] = "off"
    """The same for a step whose loss or gradient norm stands out above those of the steps before; `off`: not judged."""
    spike_zscore: PositiveFloat = 10.0
    """Standard deviations above the median, estimated robustly, from which a step stands out."""
    spike_window: Annotated[int, Field(ge=8, le=LONGEST_SPIKE_WINDOW)] = 128
    """Steps taken before, to which a step is compared; none is judged before there are as many."""
    max_skips: NonNegative = 10
    """Skipped steps after which `skip` stops the run too."""
    watchdog_seconds: SecondsOrNever = 120.0
    """A step that takes longer ends every rank with its stacks in `RUN/logs`, and names the rank that the others wait
    for; saves, validations and the first step may take four times as long. 0: never, and no straggler is named."""
    max_rollbacks: NonNegative = 3
    """Times the run goes back; the next bad step that asks for it stops the run."""
    check_replicas_every: NonNegative = 0
    """Steps between two comparisons (there is one before each checkpoint too) of the bits of what several ranks hold
    copies of; another value on one of them stops the run (exit code 3) and names the rank. 0: never."""
    rerun_every: NonNegative = 0
    """Steps between two at which loss and gradients are computed twice and their bits compared; a difference stops the
    run (exit code 3) and names the rank. Needs `run.deterministic`. 0: never."""
    max_crashes: NonNegative = 3
    """Stop with a verdict (exit code 3) instead of starting again, when one step has failed or hung this many times
    in a row with no checkpoint past it; 0: never. Killed processes do not count, and a changed recipe counts anew."""
    grace_seconds: SecondsOrNever = 0.0
    """Seconds from the first stop signal to the end, whatever happens: if the state is not saved by then, the process
    says what is lost and ends. A little less than the scheduler grants; 0: no limit."""
    snapshot_every: NonNegative = 0
    """Steps between two copies of the whole state in the memory of the machines, each machine's part on the next one
    too: a restart after the loss of one machine, or of processes, then goes on from there without reading a disk. 0:
    never. A machine keeps up to four times its part of a checkpoint, and the copy that is being written."""
    snapshot_dir: PathText = "/dev/shm"
    """Folder for them on each machine: of a file system in memory, which outlives the run's processes."""
    standby: bool = False
    """Ranks beyond the largest mesh that fits wait for the next start of the run, instead of being refused."""


class Metrics(Section):
    """What is measured and where it goes; `metrics.jsonl` is always written."""

    log_every: Positive = 10
    """Steps between two rows; the first and the last step always have one."""
    tensorboard: bool = True
    """Write TensorBoard event files to the run folder."""
    sinks: Texts = ()
    """Further places that rows go to, by the names under which plugins have registered them (`plugins.modules`)."""


class Debug(Section):
    """Tools for looking inside; all slow, all off by default."""

    find_nonfinite: bool = False
    """Check every module's output and gradient; the first that is not finite stops the run (exit code 3) by name."""
    trace_shapes: bool = False
    """Print each module's input and output shapes during the first step."""
    overfit_one_batch: bool = False
    """Train every step on the first step's samples: the loss must go to zero if the model can learn at all."""


class Plugins(Section):
    """Python modules of your own (docs/extend.md)."""

    modules: Texts = ()
    """Modules that are imported before the recipe is checked, and register model families, optimizers, schedules,
    corpus readers, metric sinks, kernels, or a section of the recipe. They run with your rights."""


class Recipe(Section):
    """A whole run."""

    run: Run = Run()
    model: Model = Model()
    data: Data = Data()
    training: Training = Training()
    validation: Validation = Validation()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    parallel: Parallel = Parallel()
    precision: Precision = Precision()
    kernels: Kernels = Kernels()
    recompute: Recompute = Recompute()
    compile: Compile = Compile()
    checkpoint: Checkpoint = Checkpoint()
    resilience: Resilience = Resilience()
    metrics: Metrics = Metrics()
    plugins: Plugins = Plugins()
    debug: Debug = Debug()


_PLUGIN_SECTIONS: dict[str, type[Section]] = {}


def register_section(name: str, section: type[Section]) -> None:
    """Give recipes a table `[name]`, a plugin's own: all keys have defaults. Raises `ValueError` for a taken name."""
    if name in Recipe.model_fields or _PLUGIN_SECTIONS.get(name, section) is not section:
        raise ValueError(f"recipes have a section [{name}] already")
    section()  # a key without a default fails here
    _PLUGIN_SECTIONS[name] = section
    recipe_class.cache_clear()


@functools.cache
def recipe_class() -> type[Recipe]:
    """`Recipe` with the sections of the plugins that were imported; an attribute each, by its name."""
    fields: dict[str, Any] = {name: (section, section()) for name, section in _PLUGIN_SECTIONS.items()}
    return create_model("Recipe", __base__=Recipe, __doc__=Recipe.__doc__, **fields) if fields else Recipe
