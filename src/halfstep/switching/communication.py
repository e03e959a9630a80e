"""Gradients between processes in 16 bits: a communication hook of DistributedDataParallel."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from halfstep.errors import OperandError
from halfstep.switching.boundary import Gate

__all__ = ["compress"]

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def compress(ddp: DistributedDataParallel, numbers: str, gate: Gate) -> None:
    """Have ``ddp`` sum its buckets in ``numbers``, predivided by its ranks; in fp16 times the loss scale.

    ::

        sent = to16(g * (S / W)); sum over ranks in 16 bits; g = to32(sum) / S      S = 1 in bf16

    FP32's range does not go through FP16: gradients in ``p.grad`` are true ones, divided by the loss scale
    already, so the small would be lost, and without 1 / W the sum of W large ones would overflow.
    """
    if numbers not in _DTYPES:
        raise OperandError(f"gradients travel in {' or '.join(_DTYPES)}, not in {numbers!r}")
    if not isinstance(ddp, DistributedDataParallel):
        raise OperandError(
            "compress_gradients takes the DistributedDataParallel around the model, "
            f"not a {type(ddp).__name__}"
        )
    dtype = _DTYPES[numbers]
    group = ddp.process_group
    size = dist.get_world_size(group)

    def hook(state, bucket):  # torch compares annotations with its own: there are none
        scale = gate.scale if dtype is torch.float16 else 1.0
        sent = bucket.buffer().mul(scale / size).to(dtype)
        if not sent.is_cuda:
            # Waited for: continuations run Python on a thread of gloo's; one run in eight aborted with them.
            dist.all_reduce(sent, group=group)
            done = torch.futures.Future()
            done.set_result(bucket.buffer().copy_(sent).div_(scale))
            return done
        reduced = dist.all_reduce(sent, group=group, async_op=True).get_future()  # pyright: ignore

        def widened(future: torch.futures.Future[list[Tensor]]) -> Tensor:
            return bucket.buffer().copy_(future.value()[0]).div_(scale)

        return reduced.then(widened)

    ddp.register_comm_hook(None, hook)
