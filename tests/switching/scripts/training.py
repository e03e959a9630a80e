"""A small training script with much around it: loaders with workers, a schedule, an average, a checkpoint."""

import argparse
import copy
import io
import logging
import multiprocessing
import sys
import warnings

import torch
import torch.nn.functional as F
from torch import nn


class Numbers(torch.utils.data.Dataset):
    """Four features about 1 or about -1, and which."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        noise = torch.randn(4, generator=torch.Generator().manual_seed(index))
        label = index % 2
        return 0.3 * noise + (2 * label - 1), label, "halfstep.switching.launcher" in sys.modules


class Net(nn.Module):
    """Two layers."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 32), nn.Linear(32, 2)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--start", default="fork")
    parser.add_argument("--fail", default="")
    options = parser.parse_args()
    logging.basicConfig(format="%(module)s %(message)s")
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    average = copy.deepcopy(model)
    loader = torch.utils.data.DataLoader(
        Numbers(), 16, num_workers=1, multiprocessing_context=options.start
    )
    seen = set()
    for _ in range(3):
        for x, y, launched in loader:
            seen.update(launched.tolist())
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            with torch.no_grad():
                for a, p in zip(average.parameters(), model.parameters(), strict=True):
                    a.lerp_(p, 0.5)
        schedule.step()
    with torch.no_grad():
        right = sum((average(x).argmax(1) == y).sum().item() for x, y, _ in loader)
    print(f"right {right} of 64, rate {schedule.get_last_lr()}", file=sys.stdout)
    print("launched in a worker:", seen == {True} if options.start == "spawn" else "-")
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    Net().load_state_dict(torch.load(file)["model"])
    print({str(p.dtype) for p in model.parameters()}, multiprocessing.current_process().name)
    warnings.warn("a warning of the script", stacklevel=1)
    logging.warning("a record of the script")
    if options.fail == "forward":
        model(torch.ones(2, 3))
    if options.fail == "backward":
        model(torch.ones(2, 4)).backward()
    if options.fail == "status":
        sys.exit(5)


if __name__ == "__main__":
    main()
