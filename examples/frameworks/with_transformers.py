"""Hugging Face's Trainer: one callback."""

import tempfile

import torch
import transformers

from halfstep.switching.frameworks.transformers import HalfstepCallback

config = transformers.GPT2Config(
    vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1
)
tokens = [(torch.arange(16) + start) % 64 for start in range(32)]
with tempfile.TemporaryDirectory() as folder:
    trainer = transformers.Trainer(
        transformers.GPT2LMHeadModel(config),
        transformers.TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=8,
            use_cpu=True,
            logging_steps=2,
            report_to=[],
        ),
        train_dataset=[{"input_ids": t, "labels": t} for t in tokens],  # pyright: ignore
        callbacks=[HalfstepCallback("fp16")],
    )
    trainer.train()
print(trainer.state.log_history[0])
