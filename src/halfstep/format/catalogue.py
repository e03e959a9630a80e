"""Every scalar format that has a name: one literal each, with the standard it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from halfstep.format.choices import Kind, Overflow, Specials
from halfstep.format.number import Format

__all__ = ["CATALOGUE", "SYNONYMS", "formats"]

_OFP8 = "OCP 8-bit Floating Point Specification (OFP8) v1.0, section 5.1"
_MX = "OCP Microscaling Formats (MX) v1.0, section 5.3"

_LITERALS = (
    Format(
        name="fp32",
        exponent_bits=8,
        mantissa_bits=23,
        bias=127,
        specials=Specials.IEEE,
        overflow=Overflow.INF,
        source="IEEE 754-2019, binary32",
    ),
    Format(
        name="tf32",
        exponent_bits=8,
        mantissa_bits=10,
        bias=127,
        specials=Specials.IEEE,
        overflow=Overflow.INF,
        source="NVIDIA A100 Tensor Core GPU Architecture whitepaper, 2020: the operand of a "
        "tensor core, held in 32 bits of which 19 count",
    ),
    Format(
        name="bf16",
        exponent_bits=8,
        mantissa_bits=7,
        bias=127,
        specials=Specials.IEEE,
        overflow=Overflow.INF,
        source="Intel, BFLOAT16 Hardware Numerics Definition, 2018; with gradual underflow, "
        "as torch.bfloat16",
    ),
    Format(
        name="fp16",
        exponent_bits=5,
        mantissa_bits=10,
        bias=15,
        specials=Specials.IEEE,
        overflow=Overflow.INF,
        source="IEEE 754-2019, binary16",
    ),
    Format(
        name="e5m2",
        exponent_bits=5,
        mantissa_bits=2,
        bias=15,
        specials=Specials.IEEE,
        overflow=Overflow.INF,
        source=f"{_OFP8}; overflow not saturating, as torch.float8_e5m2",
    ),
    Format(
        name="e4m3fn",
        exponent_bits=4,
        mantissa_bits=3,
        bias=7,
        specials=Specials.NAN_ONLY,
        overflow=Overflow.SATURATE,
        source=f"{_OFP8} (there E4M3); overflow saturating, as torch.float8_e4m3fn",
    ),
    Format(
        name="e4m3",
        exponent_bits=4,
        mantissa_bits=3,
        bias=7,
        specials=Specials.IEEE,
        overflow=Overflow.INF,
        source="IEEE 754-2019, section 3 with k = 8, p = 4; LLVM's and ml_dtypes' float8_e4m3",
    ),
    Format(name="e3m2", exponent_bits=3, mantissa_bits=2, bias=3, source=f"{_MX}.2, FP6"),
    Format(name="e2m3", exponent_bits=2, mantissa_bits=3, bias=1, source=f"{_MX}.2, FP6"),
    Format(name="e2m1", exponent_bits=2, mantissa_bits=1, bias=1, source=f"{_MX}.3, FP4"),
    Format(
        name="e8m0",
        exponent_bits=8,
        mantissa_bits=0,
        bias=127,
        signed=False,
        zero=False,
        specials=Specials.NAN_ONLY,
        overflow=Overflow.NAN,
        source="OCP Microscaling Formats (MX) v1.0, section 5.4.1: a scale, powers of two only",
    ),
    Format(
        name="int8",
        kind=Kind.FIXED,
        integer_bits=8,
        source="two's complement, saturating as in DSP arithmetic (MX scales it by 2^-6)",
    ),
    Format(
        name="int4",
        kind=Kind.FIXED,
        integer_bits=4,
        source="two's complement, saturating as in DSP arithmetic",
    ),
    Format(
        name="ternary",
        kind=Kind.FIXED,
        integer_bits=2,
        symmetric=True,
        source="Li et al., Ternary Weight Networks, arXiv 1605.04711: -1, 0, +1",
    ),
    Format(
        name="binary",
        kind=Kind.BINARY,
        source="Courbariaux et al., Binarized Neural Networks, arXiv 1602.02830, eq. 1 and 2",
    ),
)

CATALOGUE: Mapping[str, Format] = MappingProxyType({f.name: f for f in _LITERALS})

SYNONYMS: Mapping[str, str] = MappingProxyType(
    {
        "float": "fp32",
        "float32": "fp32",
        "single": "fp32",
        "binary32": "fp32",
        "tensorfloat32": "tf32",
        "bfloat16": "bf16",
        "half": "fp16",
        "float16": "fp16",
        "binary16": "fp16",
        "float8_e5m2": "e5m2",
        "fp8_e5m2": "e5m2",
        "float8_e4m3fn": "e4m3fn",
        "fp8_e4m3fn": "e4m3fn",
        "float8_e4m3": "e4m3",
        "float8_e8m0fnu": "e8m0",
        "fp8_e8m0": "e8m0",
        "float6_e3m2fn": "e3m2",
        "fp6_e3m2": "e3m2",
        "float6_e2m3fn": "e2m3",
        "fp6_e2m3": "e2m3",
        "float4_e2m1fn": "e2m1",
        "fp4_e2m1": "e2m1",
        "fp4": "e2m1",
    }
)


def formats() -> Mapping[str, Format]:
    """Every format that has a name, by name, widest first; families are made by `Format.parse`.

    >>> [name for name, f in formats().items() if f.has_inf]
    ['fp32', 'tf32', 'bf16', 'fp16', 'e5m2', 'e4m3']
    """
    return CATALOGUE
