"""Hugging Face Trainer on transformers' own Llama of the same sizes. Nothing is logged, saved or evaluated."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from rules import (
    ADAM_EPS,
    BETAS,
    CLIP_NORM,
    INIT_STD,
    LEARNING_RATE,
    NORM_EPS,
    ROPE_THETA,
    WEIGHT_DECAY,
    Gate,
    Settings,
)
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments


class Windows(torch.utils.data.Dataset):
    """The corpus cut into sequences; the model shifts the labels itself."""

    def __init__(self, settings: Settings) -> None:
        length = settings.sequence_length
        corpus = np.fromfile(settings.corpus, np.uint8)
        self.rows = corpus[: len(corpus) // length * length].reshape(-1, length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.from_numpy(self.rows[index].astype(np.int64))
        return {"input_ids": tokens, "labels": tokens}


class GateCallback(TrainerCallback):
    """Waits at the gate before the first step and after each."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.gate.boundary()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.gate.boundary()


def main() -> None:
    settings = Settings.from_command_line()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=settings.vocab_size,
            hidden_size=settings.dim,
            intermediate_size=settings.ffn_dim,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.kv_heads,
            max_position_embeddings=settings.sequence_length,
            initializer_range=INIT_STD,
            rms_norm_eps=NORM_EPS,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
            use_cache=False,
        )
    )
    arguments = TrainingArguments(
        output_dir=settings.folder,
        per_device_train_batch_size=settings.batch,
        max_steps=10**9,
        use_cpu=not torch.cuda.is_available(),
        bf16=settings.precision == "bfloat16",
        torch_compile=settings.compile,
        optim="adamw_torch_fused",
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_epsilon=ADAM_EPS,
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=CLIP_NORM,
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    gate = Gate(sum(p.numel() for p in model.parameters()))
    Trainer(model, arguments, train_dataset=Windows(settings), callbacks=[GateCallback(gate)]).train()


if __name__ == "__main__":
    main()
