"""Hugging Face's Trainer on a small GPT-2 with random weights."""

import sys
import tempfile

import torch
import transformers

transformers.set_seed(0)
config = transformers.GPT2Config(
    vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1
)
model = transformers.GPT2LMHeadModel(config)


class Counting(torch.utils.data.Dataset):
    """Tokens that count upwards from a start."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        tokens = (torch.arange(16) + index) % 64
        return {"input_ids": tokens, "labels": tokens}


with tempfile.TemporaryDirectory() as folder:
    arguments = transformers.TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=16,
        num_train_epochs=5,
        learning_rate=1e-2,
        use_cpu=True,
        bf16=sys.argv[1] == "bf16",
        report_to=[],
        save_strategy="steps",
        save_steps=10,
        disable_tqdm=True,
        **({"gradient_checkpointing": True} if sys.argv[1] == "checkpointed" else {}),
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Counting())
    result = trainer.train()
print(f"loss {result.training_loss:.1f}, steps {result.global_step}")
