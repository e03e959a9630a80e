"""Every scalar format that has a name: one literal each, with the standard it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from halfstep.format.choices import Kind, Overflow, Specials
from halfstep.format.number import Format

__all__ = ["CATALOGUE", "SYNONYMS", "formats"]

_OFP8 = "OCP 8-bit Floating Point Specification (OFP8) v1.0"
_P3109 = "IEEE P3109, Arithmetic Formats for Machine Learning, interim report"
_MX = "OCP Microscaling Formats (MX) v1.0"


def _p3109(precision: int, domain: str) -> Format:
    """Eight bits, signed, of that precision: extended, with infinities, or finite."""
    extended = domain == "e"
    return Format(
        name=f"binary8p{precision}s{domain}",
        exponent_bits=8 - precision,
        mantissa_bits=precision - 1,
        bias=2 ** (7 - precision),
        specials=Specials.EXTENDED if extended else Specials.FINITE,
        overflow=Overflow.INF if extended else Overflow.SATURATE,
        source=f"{_P3109}: {'extended' if extended else 'finite'} domain",
    )


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
        source="IEEE 754-2019 with k = 8, p = 4; LLVM's and ml_dtypes' float8_e4m3",
    ),
    Format(
        name="e4m3fnuz",
        exponent_bits=4,
        mantissa_bits=3,
        bias=8,
        specials=Specials.FINITE,
        overflow=Overflow.NAN,
        source="Noune et al., 8-bit Numerical Formats for Deep Neural Networks, arXiv 2206.02915 "
        "(not checked); overflow to NaN, as torch.float8_e4m3fnuz",
    ),
    Format(
        name="e5m2fnuz",
        exponent_bits=5,
        mantissa_bits=2,
        bias=16,
        specials=Specials.FINITE,
        overflow=Overflow.NAN,
        source="Noune et al., 8-bit Numerical Formats for Deep Neural Networks, arXiv 2206.02915 "
        "(not checked); overflow to NaN, as torch.float8_e5m2fnuz",
    ),
    *(_p3109(precision, domain) for precision in range(1, 8) for domain in "ef"),
    Format(name="e3m2", exponent_bits=3, mantissa_bits=2, bias=3, source=f"{_MX}, FP6"),
    Format(name="e2m3", exponent_bits=2, mantissa_bits=3, bias=1, source=f"{_MX}, FP6"),
    Format(name="e2m1", exponent_bits=2, mantissa_bits=1, bias=1, source=f"{_MX}, FP4"),
    Format(
        name="e8m0",
        exponent_bits=8,
        mantissa_bits=0,
        bias=127,
        signed=False,
        zero=False,
        specials=Specials.NAN_ONLY,
        overflow=Overflow.NAN,
        source="OCP Microscaling Formats (MX) v1.0: a scale, powers of two only",
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
        source="Li et al., Ternary Weight Networks, arXiv 1605.04711 (not checked): -1, 0, +1",
    ),
    Format(
        name="binary",
        kind=Kind.BINARY,
        source="Courbariaux et al., Binarized Neural Networks, arXiv 1602.02830 (not checked)",
    ),
)

CATALOGUE: Mapping[str, Format] = MappingProxyType({f.name: f for f in _LITERALS})

# The interim report's first edition and gfloat's first names had the extended domain only.
_P3109_SYNONYMS = {
    written.format(p=p, d=d): f"binary8p{p}s{d or 'e'}"
    for p in range(1, 8)
    for written, domains in {
        "binary8p{p}{d}": ("",),
        "p3109_p{p}{d}": ("",),
        "p3109_8p{p}{d}": ("",),
        "p3109_k8p{p}s{d}": ("e", "f"),
        "p3109_8p{p}s{d}": ("e", "f"),
    }.items()
    for d in domains
}

SYNONYMS: Mapping[str, str] = MappingProxyType(
    {
        **_P3109_SYNONYMS,
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
        "float8_e4m3fnuz": "e4m3fnuz",
        "float8_e5m2fnuz": "e5m2fnuz",
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

    >>> [name for name, f in formats().items() if f.has_inf][:6]
    ['fp32', 'tf32', 'bf16', 'fp16', 'e5m2', 'e4m3']
    """
    return CATALOGUE
