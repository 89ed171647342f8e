"""`titanlite generate RUN`: continue a prompt with a trained model, token by token, as it is made."""

from __future__ import annotations

import argparse
import codecs
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from titanlite.checkpoint.format import Manifest
from titanlite.checkpoint.storage import recipe_of
from titanlite.corpus.tokenizers import is_another, tokenizer_of_run
from titanlite.errors import CheckpointError, UsageError
from titanlite.models.spec import saved_buffers, spec_of
from titanlite.plan.describe import WEIGHTS_DEPEND_NOT_ON, model_differences
from titanlite.recipe.load import load_run_recipe
from titanlite.recipe.paths import path_argument
from titanlite.recipe.sections import Recipe

if TYPE_CHECKING:
    import torch


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="titanlite generate", description="Continue a prompt with a trained model.")
    parser.add_argument("run", type=path_argument, help="run folder, such as runs/debug")
    parser.add_argument("--prompt", default="", help="text to continue; none: a new document")
    parser.add_argument("--tokens", type=int, default=256, help="tokens to make at most (default 256)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token (default 0.8)")
    parser.add_argument("--top-p", type=float, default=0.95, help="only the likeliest tokens, up to this share (0.95)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text (default 0)")
    arguments = parser.parse_args(argv)
    if arguments.tokens < 1 or not arguments.temperature >= 0 or not 0 < arguments.top_p <= 1:
        raise UsageError("--tokens must be at least 1, --temperature at least 0, and --top-p in (0, 1].")
    if not 0 <= arguments.seed < 2**63:
        raise UsageError(f"--seed {arguments.seed} must be at least 0 and below 2^63.")

    import torch

    from titanlite.models.generate import Sampler, generate

    recipe = load_run_recipe(arguments.run)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, manifest = load_model(arguments.run, recipe, device)
    tokenizer = tokenizer_of_run(arguments.run, recipe.data)
    if is_another(tokenizer, manifest.values.get("tokenizer")):
        problem = f"its weights belong to another tokenizer than {recipe.data.tokenizer!r}"
        raise UsageError(f"{arguments.run}/recipe.toml: data.tokenizer: {problem}; write the path of theirs.")
    sampler = Sampler(arguments.temperature, arguments.top_p, arguments.seed)
    prompt = os.fsencode(arguments.prompt)  # its bytes as they were typed, UTF-8 or not
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    sys.stdout.write(decoder.decode(prompt))
    context = recipe.training.sequence_length
    beginning = [tokenizer.separator, *tokenizer.encode(prompt).tolist()]
    for token in generate(model, beginning, arguments.tokens, context, tokenizer.vocab_size, sampler):
        if token == tokenizer.separator:
            break
        sys.stdout.write(decoder.decode(tokenizer.decode([token])))
        sys.stdout.flush()
    sys.stdout.write(decoder.decode(b"", final=True) + "\n")
    return 0


def load_model(run: Path, recipe: Recipe, device: torch.device) -> tuple[torch.nn.Module, Manifest]:
    """The model of a run with the weights of its latest usable checkpoint, and that one's manifest. Raises
    `CheckpointError` without one, and `UsageError` if its weights were trained in another model."""
    from titanlite.checkpoint.manager import CheckpointManager
    from titanlite.models.shard import Shard
    from titanlite.precision.casting import compute_dtype, master_dtype

    spec = spec_of(recipe.model.preset)
    with device:
        model = spec.build(spec.configure(recipe.model), compute_dtype(recipe.precision))
    model.to(master_dtype(recipe.precision)).requires_grad_(False)
    held = {**dict(model.named_parameters()), **saved_buffers(model)}
    weights = {f"model.{name}": Shard.whole(tensor) for name, tensor in held.items()}
    manager = CheckpointManager(run / "checkpoints", lambda text: print(text, file=sys.stderr))
    manifest = manager.load_latest(weights, prefix="model.")
    if manifest is None:
        raise CheckpointError(f"{run} holds no checkpoint yet; checkpoint.every_steps says when the run saves one.")
    trained = recipe_of(manifest, manager.path(manifest.step)).model
    for key, (before, now) in model_differences(trained, recipe.model).items():
        if key not in WEIGHTS_DEPEND_NOT_ON:
            problem = f"model.{key} is {now!r}, and the checkpoint of step {manifest.step} was trained with {before!r}"
            raise UsageError(f"{run / 'recipe.toml'}: {problem}; put that back.")
    return model, manifest
