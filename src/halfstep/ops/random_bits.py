"""Random bits by counter: element i of a draw has the same 32 bits on every back end.

bits(i) = mix(i, key), where the key comes from one number drawn from a `torch.Generator` for each
call. No state, so neither threads nor order nor memory layout matter. The native kernels have the
same three functions in ``_core/random.hpp``. Why not Philox: docs/decisions/0010.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch._C._functorch import (  # pyright: ignore[reportMissingModuleSource]
    is_functorch_wrapped_tensor,
)

from halfstep.errors import OperandError

__all__ = [
    "FIRST",
    "SECOND",
    "STRIDE",
    "Key",
    "bits_of",
    "check_generator",
    "draw_key",
    "random_bits",
]

ALL_BITS = 32
_MASK = 0xFFFFFFFF
# The multipliers and shifts are the best known for two rounds of xorshift-multiply (C. Wellons,
# hash-prospector, issue 19); both are below 2^31, so that a product with 32 bits fits an int64.
FIRST, SECOND = 0x21F0AAAD, 0x735A2D97
STRIDE = 0x9E3779B9  # key.high moves by so much every 2^32 elements


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """64 bits that choose one stream, in two halves of 32, and how many bits are used of each draw."""

    low: int = 0
    high: int = 0
    bits: int = ALL_BITS
    """1 to 32: the uppermost ones; the others count as 0."""

    @property
    def used(self) -> int:
        """The bits that are used, as a mask."""
        return _MASK & -(1 << (ALL_BITS - self.bits))

    @classmethod
    def from_seed(cls, seed: int, bits: int = ALL_BITS) -> Key:
        """The key of a seed: splitmix64's output, so that near seeds have far keys."""
        mask = 0xFFFFFFFFFFFFFFFF
        z = (seed + 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        z ^= z >> 31
        return cls(low=z & _MASK, high=z >> 32, bits=bits)


def draw_key(generator: torch.Generator | None, bits: int = ALL_BITS) -> Key:
    """A key from one draw of the generator; of torch's default CPU generator where it is None.

    The same seed of the generator gives the same key, and each call moves the generator on.

    Raises `OperandError` for what is no generator, and where each example of `torch.vmap` would have to
    have a key of its own.
    """
    check_generator(generator)
    device = generator.device if generator is not None else "cpu"
    seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device=device, generator=generator)
    if is_functorch_wrapped_tensor(seed):
        raise OperandError(
            "stochastic rounding inside of torch.vmap; allowed: randomness='same', or rounding the "
            "whole batch outside of it, with random bits for every element"
        )
    return Key.from_seed(int(seed), bits)


def check_generator(generator: object) -> None:
    """Raises `OperandError` for what is neither a generator nor None."""
    if not (generator is None or isinstance(generator, torch.Generator)):
        raise OperandError(
            f"generator is a {type(generator).__name__}; allowed: a torch.Generator "
            "(torch.Generator().manual_seed(0)), or None for torch's default one"
        )


def random_bits(key: Key, shape: torch.Size, device: torch.device) -> Tensor:
    """int64 tensor, uniform in [0, 2^32); element i in row-major order has bits(i)."""
    return bits_of(key, torch.arange(shape.numel(), device=device).reshape(shape))


def bits_of(key: Key, index: Tensor) -> Tensor:
    """bits(i) for each i of an int64 tensor, i >= 0: a counter, two rounds of xor and multiply."""
    h = (index & _MASK) ^ key.low
    h = ((h ^ (h >> 16)) * FIRST) & _MASK
    h = h ^ (h >> 15) ^ ((key.high + (index >> 32) * STRIDE) & _MASK)
    h = (h * SECOND) & _MASK
    return (h ^ (h >> 15)) & key.used
