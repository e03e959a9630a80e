"""Lightning, with a recipe as the trainer's precision."""

import lightning
import torch
from torch.nn.functional import cross_entropy

from halfstep.switching.frameworks.lightning import HalfstepPrecision


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2)
        )

    def training_step(self, batch, index):
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


x = torch.randn(64, 8)
data = torch.utils.data.TensorDataset(x, (x.sum(1) > 0).long())
trainer = lightning.Trainer(
    max_epochs=1,
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    gradient_clip_val=1.0,
    plugins=[HalfstepPrecision("fp16")],
)
trainer.fit(Classifier(), torch.utils.data.DataLoader(data, 16))
