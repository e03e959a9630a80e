"""`BlockTensor`: packing, files, and what it refuses."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

import halfstep
from halfstep.errors import OperandError, UnknownNameError
from halfstep.format import BlockFormat, Format, block_formats, decode, encode
from halfstep.ops import BlockTensor
from halfstep.ops.bit_packing import codes_of, pack, packed_length, unpack, values_of

NAMES = [*block_formats(), "e4m3fn@128x128", "int5@1x8", "fp16@row", "int12@row", "e6m9@row"]


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_is_undone_exactly(bits: int):
    generator = torch.Generator().manual_seed(bits)
    for shape in [(0,), (1,), (7,), (64,), (3, 13), (13, 3), (2, 5, 4), (2, 0)]:
        codes = torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.int32)
        for dim in range(len(shape)):
            packed = pack(codes, bits, dim)
            assert packed.dtype is torch.uint8
            assert packed.shape[dim] == packed_length(shape[dim], bits)
            assert torch.equal(unpack(packed, bits, shape[dim], dim), codes)


def test_the_layout_of_the_bytes():
    """Little-endian streams, said by hand: 4 bits two a byte, 6 bits four in three bytes."""
    assert pack(torch.tensor([0x1, 0x2, 0xF]), 4, 0).tolist() == [0x21, 0x0F]
    stream = 0b000001 | 0b111111 << 6 | 0b100000 << 12 | 0b010101 << 18
    packed = pack(torch.tensor([0b000001, 0b111111, 0b100000, 0b010101]), 6, 0)
    assert packed.tolist() == list(stream.to_bytes(3, "little"))


@pytest.mark.parametrize("name", ["e2m1", "e3m2", "e2m3", "e4m3fn", "e5m2", "e4m3", "e8m0", "int8"])
def test_codes_are_the_codecs(name: str):
    f = Format.parse(name)
    codes = torch.tensor(list(f.codes()))
    right = torch.tensor([float(decode(c, f)) for c in codes.tolist()], dtype=torch.float64)
    values = values_of(codes, f)
    assert torch.equal(values.nan_to_num(0, 1e30, -1e30), right.nan_to_num(0, 1e30, -1e30))
    assert torch.equal(values.isnan(), right.isnan())
    finite = right.isfinite()
    assert codes_of(right[finite], f).tolist() == codes[finite].tolist()
    assert codes[finite].tolist() == [encode(decode(c, f), f) for c in codes[finite].tolist()]


def quantized(name: str) -> BlockTensor:
    x = torch.randn(5, 70, generator=torch.Generator().manual_seed(3), dtype=torch.bfloat16)
    return halfstep.quantize_blocks(x, name, 0)


def equal(a: BlockTensor, b: BlockTensor) -> bool:
    same = (a.format, a.shape, a.dim, a.dtype) == (b.format, b.shape, b.dim, b.dtype)
    return same and all(
        torch.equal(s.contiguous().view(torch.uint8), t.contiguous().view(torch.uint8))
        for s, t in [(a.values, b.values), (a.scales, b.scales)]
    )


@pytest.mark.parametrize("name", NAMES)
def test_files_pickles_and_copies_bring_it_back(name: str, tmp_path: Path):
    b = quantized(name)
    b.save(tmp_path / "b.safetensors")
    again = BlockTensor.load(tmp_path / "b.safetensors")
    torch.save(b, tmp_path / "b.pt")  # plain pickle fails at float8 tensors in torch
    unpickled = torch.load(tmp_path / "b.pt", weights_only=False)
    for other in (again, unpickled, copy.deepcopy(b), b.to("cpu")):
        assert equal(b, other)
        assert torch.equal(b.dequantize(), other.dequantize())


def test_the_file_is_smaller_than_the_numbers(tmp_path: Path):
    x = torch.randn(256, 256)
    halfstep.quantize_blocks(x, "mxfp4").save(tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").stat().st_size < x.nbytes / 7


def test_several_in_one_file(tmp_path: Path):
    from safetensors.torch import safe_open, save_file

    first, second = quantized("mxfp4"), quantized("nvfp4")
    tensors, metadata = first.state("first.")
    more_tensors, more_metadata = second.state("second.")
    save_file({**tensors, **more_tensors}, tmp_path / "two", {**metadata, **more_metadata})
    with safe_open(tmp_path / "two", "pt") as file:
        loaded = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = file.metadata()
    assert equal(BlockTensor.from_state(loaded, about, "first."), first)
    assert equal(BlockTensor.from_state(loaded, about, "second."), second)
    assert equal(BlockTensor.load(tmp_path / "two", "first."), first)
    assert equal(BlockTensor.load(tmp_path / "two", prefix="second."), second)
    with pytest.raises(halfstep.errors.OperandError, match=r"no 'third.block_tensor'.*first.block"):
        BlockTensor.from_state(loaded, about, "third.")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "b.safetensors"
    quantized("mxfp4").save(path)
    before = path.read_bytes()

    def full(handle: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        quantized("nvfp4").save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_what_does_not_fit_is_refused(tmp_path: Path):
    b = quantized("mxfp4")
    tensors, metadata = b.state()
    for change, text in [
        (
            {"scales": tensors["scales"][:, :-1]},
            r"scales is torch.float8_e8m0fnu of shape \(1, 69\)",
        ),
        ({"values": tensors["values"].float()}, "values is torch.float32"),
    ]:
        with pytest.raises(halfstep.errors.OperandError, match=text):
            BlockTensor.from_state(tensors | change, metadata)
    with pytest.raises(halfstep.errors.OperandError, match="tensors missing: scales"):
        BlockTensor.from_state({"values": tensors["values"]}, metadata)
    newer = {k: v.replace('"version": 1', '"version": 2') for k, v in metadata.items()}
    with pytest.raises(halfstep.errors.OperandError, match="of version 2, this halfstep reads 1"):
        BlockTensor.from_state(tensors, newer)
    (tmp_path / "text").write_text("not a file of tensors")
    with pytest.raises(halfstep.errors.OperandError, match="no safetensors file"):
        BlockTensor.load(tmp_path / "text")
    with pytest.raises(halfstep.errors.OperandError, match=r"dtype torch.int8; allowed"):
        b.dequantize(torch.int8)
    with pytest.raises(OperandError, match=r"BlockTensor.to: torch.float16; allowed: a device"):
        b.to(torch.float16)  # type: ignore[arg-type]
    with pytest.raises(halfstep.errors.OperandError, match=r"out is \(5, 71\) on cpu; wanted"):
        b.dequantize(out=torch.empty(5, 71))


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "complex64"},
        {"dtype": None},
        {"dim": "last"},
        {"dim": None},
        {"shape": "5x70"},
        {"shape": None},
        {"version": None},
    ],
)
def test_a_damaged_text_is_said_so(change: dict[str, object]):
    """None: the entry is missing."""
    tensors, metadata = quantized("mxfp4").state()
    about = json.loads(metadata["block_tensor"]) | change
    damaged = {"block_tensor": json.dumps({k: v for k, v in about.items() if v is not None})}
    for text in (damaged, {"block_tensor": "{"}, {"block_tensor": "[]"}):
        with pytest.raises(OperandError, match=r"'block_tensor' is no text of BlockTensor.state: "):
            BlockTensor.from_state(tensors, text)


def test_a_format_of_another_library_is_an_unknown_name():
    tensors, metadata = quantized("mxfp4").state()
    other = {"block_tensor": metadata["block_tensor"].replace("mxfp4", "mxfp5")}
    with pytest.raises(UnknownNameError, match="unknown block format 'mxfp5'"):
        BlockTensor.from_state(tensors, other)


@pytest.mark.parametrize("name", NAMES)
def test_dequantize_to_any_dtype(name: str):
    b = quantized(name)
    wide = b.dequantize(torch.float64)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        out = torch.empty(5, 70, dtype=dtype)
        assert b.dequantize(out=out) is out
        assert torch.equal(out, b.dequantize(dtype))
        assert torch.equal(out, wide.float().to(dtype))


def test_any_codes_mean_what_the_codec_says():
    """Codes that quantising never makes: NaN elements of e4m3fn, infinities of e5m2."""
    for name in ("mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e3m2", "mxfp4", "mxint8", "e4m3@1x32"):
        f = BlockFormat.parse(name)
        b = halfstep.quantize_blocks(torch.ones(1, 256), name)
        codes = torch.arange(256, dtype=torch.uint8)[None]
        if f.element.bits < 8:
            codes = pack(codes % 2**f.element.bits, f.element.bits, 1)
        tensors, metadata = b.state()
        forged = BlockTensor.from_state(
            tensors | {"values": codes.view(b.values.dtype)}, metadata
        ).dequantize()
        right = [float(decode(c % 2**f.element.bits, f.element)) for c in range(256)]
        right = torch.tensor(right) * b.scales.float()[0, 0]
        assert torch.equal(forged[0].nan_to_num(9e9), right.nan_to_num(9e9)), name
