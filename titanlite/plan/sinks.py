"""Metrics sinks by name: `open_sink(recipe, run_folder, after_step, warn) -> Sink` (see `observe/logger.py`)."""

from titanlite.registry import Registry

SINKS = Registry("metrics sink", {name: f"titanlite.observe.{name}:open_sink" for name in ("jsonl", "tensorboard")})
