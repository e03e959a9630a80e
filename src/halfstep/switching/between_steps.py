"""What is kept between two steps: weights and optimizer state in the formats that the recipe keeps them in.

The optimizer runs on FP32 tensors, whatever it is. Before a step its state is widened; after it the weights
are rounded to ``recipe.master`` as ``recipe.update`` says, and the state is stored in ``recipe.moments``.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from halfstep import ops
from halfstep.errors import SwitchError
from halfstep.format import BlockFormat, Format, Rounding
from halfstep.ops import BlockTensor
from halfstep.recipe import Recipe, Update
from halfstep.switching.ranks import (
    is_sharded,
    local,
    shard_number,
    shard_of,
    sharded_like,
    without_memory,
)

__all__ = ["STORED", "BetweenSteps", "ShardInBlocks"]

# Formats that torch has a dtype for, which then is what a tensor of them is stored in.
STORED = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "e4m3fn": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}
# An odd number near 2^63 over the golden ratio: the seeds of successive steps lie far apart.
_STRIDE = 0x4F1BBCDCBFA53E0B
_SHARD_STRIDE = 0x2545F4914F6CDD1D
_KEY = "between_steps"


class BetweenSteps:
    """The weights and the optimizer state of one switched model, as they are kept.

    ::

        weights, nearest:     w = round(w)
        weights, stochastic:  w = round up or down by chance, so that the mean is w
        weights, kahan:       t = w + carry;  w = round(t);  carry = round(t - w)
        state:                s = round stochastically: moments move by less than half a spacing at a time

    Weights stay FP32 tensors, on the grid of their format: they are what the user's program holds, and
    their gradients are added up in FP32. Carries and state are stored in the format itself where torch has
    the dtype or it is a block format; else in FP32 on its grid. Random bits come from a counter and the
    seed of `torch.manual_seed` (0 in a distributed run, so that ranks agree); no generator is moved on.
    Of what is spread over ranks each keeps its shard so, with random bits of the shard's own.

    A carry that is not finite is 0. State that has no dimension (step counts) is left alone, and so is
    what is not a tensor of floating-point numbers in ``optimizer.state[parameter]`` (lists, say).

    Source: Zamirai et al., "Revisiting BFloat16 Training", arXiv 2010.06192, section 4 (weights).
    """

    def __init__(self, recipe: Recipe) -> None:
        in_fp32 = recipe.optimizer.name == "fp32"
        self.rounds_weights = in_fp32 and recipe.master.name != "fp32"
        self.rounds_state = in_fp32 and str(recipe.moments) != "fp32"
        self.count = 0
        """How many steps have drawn random bits."""
        self._recipe = recipe
        self._seed: int | None = None
        self._carries: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}
        self._hooked: dict[int, Any] = {}

    @property
    def idle(self) -> bool:
        """True where nothing is to be done: FP32 weights and state, or a plain 16-bit program."""
        return not (self.rounds_weights or self.rounds_state)

    def start(self, parameters: Iterable[Tensor]) -> None:
        """Round the weights to nearest, once, at the beginning."""
        if self.rounds_weights:
            for p in _masters(parameters):
                self._round(p, Rounding.NEAREST, None)

    def before(self, optimizer: Optimizer, own: Mapping[int, str]) -> None:
        """Widen the state of the model's parameters (``own``, by id) to FP32, for the optimizer."""
        if self.rounds_state:
            for state in _states(optimizer, own):
                for key, value in state.items():
                    state[key] = value.float() if _is_stored(value) else _from_blocks(value)

    def after(self, optimizer: Optimizer, own: Mapping[int, str]) -> None:
        """Round weights and state of the model's parameters after a step."""
        if self.idle:
            return
        generators = _Generators(self.seed + self.count * _STRIDE)
        self.count += 1
        if self.rounds_weights:
            given = (p for group in optimizer.param_groups for p in group["params"])
            for p in _masters(p for p in given if id(p) in own):
                if self._recipe.update is Update.KAHAN:
                    self._add_carry(p)
                elif self._recipe.update is Update.STOCHASTIC:
                    self._round(p, Rounding.STOCHASTIC, generators.of(p))
                else:
                    self._round(p, Rounding.NEAREST, None)
        if self.rounds_state:
            self._hook(optimizer)
            for state in _states(optimizer, own):
                for key, value in state.items():
                    if isinstance(value, Tensor) and value.dtype == torch.float32 and value.dim():
                        state[key] = _stored(value, self._recipe.moments, generators.of(value))

    def leave(self, optimizer: Optimizer, own: Mapping[int, str]) -> None:
        """The optimizer's state in FP32 again, for good."""
        self.before(optimizer, own)
        hook = self._hooked.pop(id(optimizer), None)
        if hook is not None:
            hook.remove()

    def _round(self, p: Tensor, how: Rounding, generator: torch.Generator | None) -> None:
        with torch.no_grad():
            ours = local(p)
            ops.round_to(ours, self._recipe.master, how, out=ours, generator=generator)
        torch.autograd.graph.increment_version(p)

    def _add_carry(self, p: Tensor) -> None:
        with torch.no_grad():
            ours = local(p)
            exact = ours + local(self.carry_of(p)).float()
            ours.copy_(exact)
            self._round(p, Rounding.NEAREST, None)
            lost = torch.nan_to_num_(exact.sub_(ours), 0.0, 0.0, 0.0)
            lost = ops.round_to(lost, self._recipe.master, out=lost)
            self._keep_carry(p, shard_of(lost.to(_dtype(self._recipe.master)), p))

    def carry_of(self, p: Tensor) -> Tensor:
        """What rounding has taken from ``p`` and the next step gives back; zeros where there is none."""
        known = self._carries.get(id(p))
        if known is not None and known[0]() is p:
            return known[1]
        return torch.zeros_like(p, dtype=_dtype(self._recipe.master), requires_grad=False)

    def _keep_carry(self, p: Tensor, carry: Tensor) -> None:
        self._carries[id(p)] = (weakref.ref(p), carry)

    # -- resuming -----------------------------------------------------------------------------------

    @property
    def seed(self) -> int:
        """What random bits come from, with the count; settled when it is first asked for."""
        if self._seed is None:
            apart = torch.distributed.is_available() and torch.distributed.is_initialized()
            self._seed = 0 if apart else torch.initial_seed() % 2**63
        return self._seed

    def state_dict(self, names: Mapping[int, str]) -> dict[str, Any]:
        """Seed, count and carries by parameter name, under one key; the optimizer has its state itself."""
        if self.idle:
            return {}
        carries = {
            names[key]: carry
            for key, (ref, carry) in self._carries.items()
            if ref() is not None and key in names
        }
        return {_KEY: {"seed": self.seed, "count": self.count, "carries": carries}}

    def load_state_dict(self, given: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> None:
        """Go on from ``state_dict()``; a state of none (a GradScaler's) changes nothing.

        Raises:
            SwitchError: a carry is of no parameter of the model, or of another shape. Nothing was changed.
        """
        if self.idle or _KEY not in given:
            return
        state = given[_KEY]
        for name, carry in state["carries"].items():
            p = parameters.get(name)
            if p is None or p.shape != carry.shape:
                raise SwitchError(
                    f"switch state has a carry of shape {tuple(carry.shape)} for {name}, and the model "
                    f"{'no such parameter' if p is None else f'one of shape {tuple(p.shape)}'}: "
                    "load the state of the same model"
                )
        self._seed, self.count = int(state["seed"]), int(state["count"])
        self._carries.clear()
        for name, carry in state["carries"].items():
            p = parameters[name]
            carry = carry.detach().to(p.device, _dtype(self._recipe.master), copy=True)
            self._keep_carry(p, carry if is_sharded(carry) else sharded_like(carry, p))

    def _hook(self, optimizer: Optimizer) -> None:
        """Have ``optimizer.state_dict()`` give plain FP32 tensors in place of what it stores in blocks."""
        if isinstance(self._recipe.moments, BlockFormat) and id(optimizer) not in self._hooked:
            self._hooked[id(optimizer)] = optimizer.register_state_dict_post_hook(_plain_state)


def _plain_state(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    plain = {
        index: {k: _from_blocks(v) for k, v in state.items()}
        for index, state in state_dict["state"].items()
    }
    return {**state_dict, "state": plain}


def _from_blocks(value: Any) -> Any:
    return value.dequantize() if isinstance(value, (BlockTensor, ShardInBlocks)) else value


def _masters(parameters: Iterable[Tensor]) -> Iterable[Tensor]:
    return (p for p in parameters if p.dtype == torch.float32)


def _states(optimizer: Optimizer, own: Mapping[int, str]) -> list[dict[str, Any]]:
    return [state for p, state in optimizer.state.items() if id(p) in own]


def _dtype(format: Format) -> torch.dtype:
    return STORED.get(format.name, torch.float32)


def _is_stored(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype in STORED.values()


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardInBlocks:
    """A rank's part of a tensor in a block format."""

    blocks: BlockTensor
    whole: Tensor
    """A tensor spread alike, without memory."""

    def dequantize(self) -> Tensor:
        """All of the tensor, spread as it was; this rank's part in FP32."""
        return shard_of(self.blocks.dequantize(), self.whole)


class _Generators:
    """Random bits of one step: drawn in one order on all ranks, other ones for each shard."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._known: dict[int, torch.Generator] = {}

    def of(self, tensor: Tensor) -> torch.Generator:
        shard = shard_number(tensor)
        if shard not in self._known:
            seed = (self._seed + shard * _SHARD_STRIDE) % 2**63
            self._known[shard] = torch.Generator().manual_seed(seed)
        return self._known[shard]


def _stored(
    value: Tensor, format: Format | BlockFormat, generator: torch.Generator
) -> Tensor | BlockTensor | ShardInBlocks:
    value = value.detach()
    ours = local(value)
    if isinstance(format, BlockFormat):
        blocks = ops.quantize_blocks(ours, format, rounding="stochastic", generator=generator)
        return (
            ShardInBlocks(blocks=blocks, whole=without_memory(value))
            if is_sharded(value)
            else blocks
        )
    rounded = ops.round_to(ours, format, "stochastic", generator=generator)
    return shard_of(rounded.to(_dtype(format)), value)
