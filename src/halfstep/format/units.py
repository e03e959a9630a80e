"""The matrix units of real chips: what they do to the products that they add, as frozen data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from halfstep.errors import FormatError, UnknownNameError
from halfstep.format.number import Format

__all__ = ["UNITS", "UNIT_SYNONYMS", "Datapath", "Unit", "units"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Datapath:
    """How a unit adds products of operands in certain formats; defined in `Unit`."""

    operands: tuple[str, ...]
    """The formats of the operands; the two may be different ones of these."""
    block: int
    """Products that are added at once to the running sum."""
    fraction_bits: int
    """What is kept of each term below the largest exponent: F."""
    result_bits: int = 23
    """Fraction bits of the sum that a block returns."""
    result: str = "fp32"
    """What that sum is kept in: fp32, truncated; or fp16, rounded to nearest, ties to even."""
    lowest_exponent: int = -133
    """The largest exponent is this at least; the exponent of a zero."""
    verified: bool = False
    """True where it gave every bit of some 1500 results recorded on the chip."""
    evidence: str = ""
    """How it is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """A matrix unit: the accumulator of `halfstep.matmul` that a real chip has.

    The sum c begins as ``initial``, in fp32, and takes ``block`` products at a time::

        exponent(x) = max(floor(log2(|x|)), the format's least normal exponent)
        E = max([lowest_exponent] + [exponent(a[k]) + exponent(b[k]) where a[k] * b[k] != 0]
                + [exponent(c) where c != 0])
        T = sum(trunc(term * 2^(F - E)) for term in [c, a[0] * b[0], a[1] * b[1], ...])
        c = T * 2^(E - F), truncated to result_bits + 1 digits and to multiples of
            2^(-126 - result_bits)

    so the products are exact, their exponents are the sums of the operands' (1.5 * 1.5 has exponent
    0), all is truncated toward zero, and no sum in between is normalised. The last block is filled
    up with zeros. An instruction over more than ``block`` products (m16n8k16 on an A100) is a chain
    of such blocks in the order of k.

    - Any NaN, infinity times zero, or infinities of both signs in a block: NaN, always 0x7FFFFFFF.
      Else an infinity stays. Products beyond fp32's range are finite and may cancel in a block.
    - A sum of 2^128 or more is an infinity; between fp32's largest number and that, truncated.
    - Subnormal operands, initial values and results are kept.
    - T = 0 is +0, also where all terms were -0; a negative sum that is truncated to zero is -0.
    - K = 0 gives ``initial``, rounded to fp32.

    ``v100/fp16`` and the others are the same units with an accumulator and a result in fp16: c begins
    as ``initial`` rounded to fp16, its exponent is -14 at least, and after each block it is T * 2^(E - F)
    rounded to nearest in fp16, ties to even, infinite from 65520 on; NaN is 0x7FFF of fp16. The terms
    are truncated as before. Only fp16 operands have it, and fp8 ones (arXiv 2511.10909).

    Source: M. Fasi, N. J. Higham, M. Mikaitis and S. Pranesh, Numerical behavior of NVIDIA tensor
    cores, PeerJ Computer Science 7:e330, 2021 (exact products, truncation, one normalisation,
    subnormal numbers); X. Li et al., FTTN, CCGrid 2024 (the blocks of H100; not checked); P. Xie
    et al., MMA-Sim, arXiv 2511.10909 (all parameters, NaN, infinities, the exponent of
    zeros, split instructions as chains); F. A. Khattak and M. Mikaitis, Accurate models of NVIDIA
    tensor cores, arXiv 2512.07004 (the same by other experiments, and the lowest exponent).

    >>> [(p.operands, p.block, p.fraction_bits) for p in Unit.parse("a100").datapaths]
    [(('fp16', 'bf16'), 8, 24), (('tf32',), 4, 24)]
    """

    name: str
    architecture: str
    datapaths: tuple[Datapath, ...]
    source: str

    @classmethod
    def parse(cls, given: object) -> Unit:
        """The unit of that name or synonym; a `Unit` is returned as it is.

        Raises `UnknownNameError` for any other name.
        """
        if isinstance(given, cls):
            return given
        name, slash, result = str(given).strip().lower().partition("/")
        name = UNIT_SYNONYMS.get(name, name) + slash + result
        if name not in UNITS:
            raise UnknownNameError("unit", given, [*UNITS, *UNIT_SYNONYMS])
        return UNITS[name]

    @property
    def result(self) -> str:
        """The format that the running sum and the result are kept in."""
        return self.datapaths[0].result

    def datapath(self, *operands: Format) -> Datapath:
        """How it multiplies operands of these formats.

        Raises `FormatError` where it has no way to.
        """
        # what overflow becomes is of no concern to numbers that are rounded already
        asked = {format.name.partition(":")[0] for format in operands}
        for path in self.datapaths:
            if asked and asked <= set(path.operands):
                return path
        has = "; ".join(" or ".join(path.operands) for path in self.datapaths)
        given = " times ".join(format.name for format in operands) or "no format"
        raise FormatError(
            f"unit {self.name} ({self.architecture}): operands {given}, which it does not multiply; "
            f"it has: {has}; name them by operands="
        )

    def __str__(self) -> str:
        return self.name


_RECORDED = "gave all of 1500 results recorded on this chip"
_SAME_PAPERS = "as published in arXiv 2511.10909 and 2512.07004; no recordings compared"
_BLOCK_8 = "recorded with K = 4, and equal; the block of 8 is of arXiv 2511.10909 and 2512.07004"
_FP8 = ("e4m3fn", "e5m2")


def _half(block: int, fraction_bits: int, lowest: int, evidence: str, *names: str) -> Datapath:
    return Datapath(
        operands=names or ("fp16", "bf16"),
        block=block,
        fraction_bits=fraction_bits,
        lowest_exponent=lowest,
        verified=evidence.startswith(_RECORDED),
        evidence=evidence,
    )


_HOPPER_FP8 = Datapath(
    operands=_FP8,
    block=32,
    fraction_bits=13,
    result_bits=13,
    verified=True,
    evidence=f"{_RECORDED} (wgmma, C = 0); mma.sync goes another way there",
)

_IN_FP32 = (
    Unit(
        name="v100",
        architecture="Volta",
        datapaths=(_half(4, 23, -132, _RECORDED, "fp16"),),
        source="NVIDIA V100, HMMA.884; no bits below fp32's (Fasi et al. 2021)",
    ),
    Unit(
        name="a100",
        architecture="Ampere",
        datapaths=(_half(8, 24, -132, _RECORDED), _half(4, 24, -132, _RECORDED, "tf32")),
        source="NVIDIA A100; m16n8k16 and tf32's m16n8k8 are two blocks in a chain",
    ),
    Unit(
        name="h100",
        architecture="Hopper",
        datapaths=(
            _half(16, 25, -133, _RECORDED),
            Datapath(operands=("tf32",), block=8, fraction_bits=25, evidence=_BLOCK_8),
            _HOPPER_FP8,
        ),
        source="NVIDIA H100; fp8 by wgmma, which keeps 13 fraction bits of its sums",
    ),
    Unit(
        name="h200",
        architecture="Hopper",
        datapaths=(
            _half(16, 25, -133, f"{_RECORDED}, in fp16; bf16 as on H100"),
            Datapath(operands=("tf32",), block=8, fraction_bits=25, evidence=_SAME_PAPERS),
            replace(_HOPPER_FP8, evidence=f"{_RECORDED}, in e4m3fn (wgmma); e5m2 as on H100"),
        ),
        source="NVIDIA H200: the arithmetic of H100",
    ),
    Unit(
        name="b200",
        architecture="Blackwell",
        datapaths=(
            _half(16, 25, -133, f"{_RECORDED}, in fp16; bf16 {_SAME_PAPERS}"),
            Datapath(operands=("tf32",), block=8, fraction_bits=25, evidence=_SAME_PAPERS),
            Datapath(
                operands=_FP8,
                block=32,
                fraction_bits=25,
                evidence="the model of tcgen05.mma in arXiv 2511.10909; differs in 549 (e4m3fn) and "
                "526 (e5m2) of 1500 results recorded of mma.sync, which on this chip joins two "
                "interleaved blocks of 16 (arXiv 2512.07004)",
            ),
        ),
        source="NVIDIA B200; fp8 by tcgen05.mma",
    ),
    Unit(
        name="ada",
        architecture="Ada Lovelace",
        datapaths=(
            Datapath(
                operands=_FP8,
                block=16,
                fraction_bits=13,
                result_bits=13,
                lowest_exponent=-132,
                verified=True,
                evidence=f"{_RECORDED} (L40S, e4m3fn); e5m2 {_SAME_PAPERS}",
            ),
            _half(8, 24, -132, _SAME_PAPERS),
            _half(4, 24, -132, _SAME_PAPERS, "tf32"),
        ),
        source="NVIDIA L40S, RTX 4090 and others; m16n8k32 of fp8 is two blocks in a chain",
    ),
)

_IN_FP16 = (
    "as published in arXiv 2511.10909: the same sums, rounded to fp16; no recordings compared"
)


def _in_fp16(unit: Unit) -> Unit:
    """The unit with an accumulator in fp16, which those with bf16 and tf32 operands have not."""
    paths = [
        replace(
            path,
            operands=tuple(name for name in path.operands if name not in ("bf16", "tf32")),
            result="fp16",
            result_bits=10,
            verified=False,
            evidence=_IN_FP16,
        )
        for path in unit.datapaths
    ]
    kept = tuple(path for path in paths if path.operands)
    return replace(unit, name=f"{unit.name}/fp16", datapaths=kept)


_LITERALS = (*_IN_FP32, *map(_in_fp16, _IN_FP32))
UNITS: Mapping[str, Unit] = MappingProxyType({unit.name: unit for unit in _LITERALS})

# What users call them.
UNIT_SYNONYMS: Mapping[str, str] = MappingProxyType(
    {
        "volta": "v100",
        "ampere": "a100",
        "hopper": "h100",
        "h800": "h100",
        "gh200": "h200",
        "blackwell": "b200",
        "gb200": "b200",
        "l40s": "ada",
        "l40": "ada",
        "rtx4090": "ada",
    }
)


def units() -> Mapping[str, Unit]:
    """Every matrix unit that is modelled, by name: what ``accumulate=`` of `halfstep.matmul` takes.

    >>> sorted(name for name, unit in units().items() if unit.result == "fp32")
    ['a100', 'ada', 'b200', 'h100', 'h200', 'v100']
    >>> units()["v100/fp16"].result
    'fp16'
    """
    return UNITS
