"""`BlockTensor`: a tensor stored in a block format, and its file."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfstep.errors import HalfstepError, OperandError
from halfstep.format import BlockFormat
from halfstep.ops.backends import Backend, choose
from halfstep.ops.bit_packing import packed_length, stored_as
from halfstep.ops.block_reference import Parts, scales_shape
from halfstep.ops.custom import block_format_text, choice_text, is_traced, operator, value_of
from halfstep.ops.rounding import CARRIERS

__all__ = ["BlockTensor"]

_VERSION = 1
_PARTS = ("values", "scales", "tensor_scale")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class BlockTensor:
    """A tensor in a block format: packed elements and the scales of their blocks.

    Made by `halfstep.quantize_blocks`; ``dequantize()`` is the way back. The fields are plain tensors.

    Raises `OperandError` for fields that do not fit each other.

    >>> import halfstep
    >>> b = halfstep.quantize_blocks(torch.ones(2, 64), "mxfp4")
    >>> b
    BlockTensor(mxfp4, shape=(2, 64), dim=1, dtype=float32, 68 bytes on cpu)
    >>> b.values.shape, b.scales.shape, b.nbytes
    (torch.Size([2, 32]), torch.Size([2, 2]), 68)
    """

    values: Tensor
    """The elements. float8_e4m3fn, float8_e5m2, float16 ... where torch has that dtype, int8 for
    8-bit integers: of the tensor's shape. Else uint8 codes, packed without gaps along ``dim``:
    two of 4 bits make a byte, the first in the lower half; four of 6 bits make three bytes."""
    scales: Tensor
    """One for each block, of the tensor's shape but for ``dim`` (and the rows of a tile), which
    count blocks: float8_e8m0fnu, float8_e4m3fn or float32. NaN says that the block is NaN."""
    tensor_scale: Tensor
    """float32, of shape (): what all scales are multiples of. 1, and not stored, but in nvfp4."""
    format: BlockFormat
    shape: torch.Size
    dim: int
    """The axis along which blocks lie, counted from 0."""
    dtype: torch.dtype
    """That of the tensor it was made of, and of ``dequantize()``."""
    _edge: Tensor = field(default_factory=lambda: torch.empty(0))
    """Where the gradient of ``dequantize()`` goes; one number of memory."""
    _text: str = ""
    """What stands for the format in the graph that made this, if one did."""

    def __post_init__(self) -> None:
        if is_traced():  # made by a node of the graph, which fits
            return
        length = max(len(self.shape), 1)
        if self.dtype not in CARRIERS or not 0 <= self.dim < length:
            raise OperandError(
                f"BlockTensor: dtype {self.dtype}, dim {self.dim} of shape {tuple(self.shape)}; "
                "allowed: float32, float64, float16, bfloat16, and a dim of the shape from 0 on"
            )
        element, shape = self.format.element, self.storage_shape
        packed = list(shape)
        if element.bits < 8:
            packed[self.dim] = packed_length(shape[self.dim], element.bits)
        wanted = {
            "values": (stored_as(element), packed),
            "scales": (stored_as(self.format.scale), scales_shape(shape, self.format, self.dim)),
            "tensor_scale": (torch.float32, []),
        }
        for name, (dtype, sizes) in wanted.items():
            part = getattr(self, name)
            if part.dtype is not dtype or list(part.shape) != sizes:
                raise OperandError(
                    f"BlockTensor: {name} is {part.dtype} of shape {tuple(part.shape)}; "
                    f"{self.format} of shape {tuple(self.shape)} along dim {self.dim} has {dtype} "
                    f"of shape {tuple(sizes)}"
                )

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"BlockTensor({self.format}, shape={tuple(self.shape)}, dim={self.dim}, dtype={dtype}, "
            f"{self.nbytes} bytes on {self.device})"
        )

    @property
    def device(self) -> torch.device:
        """Where the values are."""
        return self.values.device

    @property
    def storage_shape(self) -> torch.Size:
        """The shape that blocks are laid in: ``shape``, but (1,) of a scalar."""
        return self.shape or torch.Size([1])

    @property
    def nbytes(self) -> int:
        """Bytes stored: values, scales, and the tensor scale where the format has one."""
        second = self.tensor_scale.nbytes if self.format.has_tensor_scale else 0
        return self.values.nbytes + self.scales.nbytes + second

    def numel(self) -> int:
        """How many numbers it stands for."""
        return self.shape.numel()

    def dequantize(
        self,
        dtype: torch.dtype | None = None,
        out: Tensor | None = None,
        *,
        backend: Backend | str = Backend.AUTO,
    ) -> Tensor:
        """The numbers that are stored: element * (scale * tensor scale), in ``dtype`` (its own).

        New, or written to ``out`` (same shape and device; one of the four dtypes). The two products
        are float32's (the second float64's where ``dtype`` is), each rounded once, then the number is
        rounded to nearest in ``dtype``. A block whose scale is NaN is NaN.

        Gradient: straight through to what was quantised, where that asked for one.

        Raises `OperandError` for a dtype or an ``out`` that cannot be.

        >>> import halfstep
        >>> halfstep.quantize_blocks(torch.tensor([1.0, 2.7, -3.9]), "mxfp4").dequantize()
        tensor([ 1.,  3., -3.])
        """
        wants_grad = torch.is_grad_enabled() and self._edge.requires_grad
        if out is None:
            dtype = self.dtype if dtype is None else dtype
            if dtype not in CARRIERS:
                raise OperandError(
                    f"dequantize: dtype {dtype!r}; allowed: {', '.join(map(str, CARRIERS))}"
                )
        else:
            _check_out(out, self.shape, self.device, dtype)
            if wants_grad:
                raise OperandError("dequantize: out= cannot be differentiated; leave it away")
        stored = (self.values, self.scales, self.tensor_scale)
        if is_traced():
            text = self._text or block_format_text(self.format)
            rest = (self.shape, self.dim, text, choice_text(backend))
            edge = self._edge if wants_grad else None
            number = _node(*stored, edge, *rest, dtype if out is None else out.dtype)
            return number if out is None else out.copy_(number)
        if out is None:
            out = torch.empty(self.shape, dtype=dtype, device=self.device)
        with torch.no_grad():
            _dequantize_into(out, *stored, self.dim, self.format, Backend.parse(backend))
        return _Join.apply(self._edge, out) if wants_grad else out  # pyright: ignore[reportReturnType]

    def detach(self) -> BlockTensor:
        """The same storage, through which no gradient goes."""
        return replace(self, _edge=torch.empty(0))

    def to(self, device: torch.device | str) -> BlockTensor:
        """A copy on that device; itself if it is there. Raises `OperandError` for what is no device."""
        if not isinstance(device, torch.device | str):
            raise OperandError(
                f"BlockTensor.to: {device!r}; allowed: a device; dequantize(dtype) gives numbers"
            )
        if torch.device(device) == self.device:
            return self
        parts = {name: getattr(self, name).to(device) for name in _PARTS}
        return replace(self, **parts)

    # Files

    def state(self, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, str]]:
        """Plain tensors, and text about them, both under names that begin with ``prefix``.

        Those of several can be put together and saved in one safetensors file.
        """
        about = {
            "version": _VERSION,
            "format": str(self.format),
            "shape": list(self.shape),
            "dim": self.dim,
            "dtype": str(self.dtype).removeprefix("torch."),
        }
        names = _PARTS if self.format.has_tensor_scale else _PARTS[:2]
        tensors = {f"{prefix}{name}": getattr(self, name).contiguous() for name in names}
        return tensors, {f"{prefix}block_tensor": json.dumps(about)}

    @classmethod
    def from_state(
        cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], prefix: str = ""
    ) -> BlockTensor:
        """What `state` of the same prefix was of. Other entries are ignored.

        Raises `OperandError` where entries are missing, of a later version, no text of ours, or contradict
        each other, `UnknownNameError` or `FormatError` for a format that there is not.
        """
        key = f"{prefix}block_tensor"
        if key not in metadata:
            near = sorted(name for name in metadata if name.endswith("block_tensor"))
            raise OperandError(
                f"BlockTensor: no {key!r} in the metadata; there is: {', '.join(near) or 'none'}"
            )
        about = _about(key, metadata[key])
        format: BlockFormat = about["format"]
        names = _PARTS if format.has_tensor_scale else _PARTS[:2]
        missing = [f"{prefix}{name}" for name in names if f"{prefix}{name}" not in tensors]
        if missing:
            raise OperandError(f"BlockTensor: tensors missing: {', '.join(missing)}")
        parts: dict[str, Any] = {name: tensors[f"{prefix}{name}"] for name in names}
        parts.setdefault("tensor_scale", torch.ones((), device=parts["values"].device))
        return cls(**parts, **about)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file of `state`, whole or not at all."""
        tensors, metadata = self.state()
        _write_whole(Path(path), _safetensors().save(tensors, metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str], prefix: str = "") -> BlockTensor:
        """The one that `save` wrote, on the CPU; with ``prefix``, that of several in one file (`state`).

        Other tensors of the file are not read. Raises what `from_state` does, and `OperandError` for
        another kind of file or a damaged one.
        """
        _safetensors()
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                ours = {f"{prefix}{name}" for name in _PARTS} & set(file.keys())
                tensors = {name: file.get_tensor(name) for name in ours}
                metadata = file.metadata() or {}
        except SafetensorError as error:
            raise OperandError(f"BlockTensor: {path} is no safetensors file: {error}") from None
        return cls.from_state(tensors, metadata, prefix)


def _about(key: str, text: str) -> dict[str, Any]:
    """The fields, but tensors, of the one that `BlockTensor.state` wrote this text about."""
    no_text = OperandError(f"BlockTensor: {key!r} is no text of BlockTensor.state: {text[:200]}")
    try:
        about: dict[str, Any] = json.loads(text)
        version = about["version"]
    except (ValueError, TypeError, KeyError):
        raise no_text from None
    if version != _VERSION:
        raise OperandError(
            f"BlockTensor: {key!r} is of version {version}, this halfstep reads {_VERSION}"
        )
    dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in CARRIERS}
    try:
        format, dim = str(about["format"]), int(about["dim"])
        shape, dtype = torch.Size(about["shape"]), dtypes[about["dtype"]]
    except (ValueError, TypeError, KeyError):
        raise no_text from None
    return {"format": BlockFormat.parse(format), "shape": shape, "dim": dim, "dtype": dtype}


def _dequantize_into(
    out: Tensor,
    values: Tensor,
    scales: Tensor,
    tensor_scale: Tensor,
    dim: int,
    format: BlockFormat,
    backend: Backend,
) -> None:
    target = out if out.dim() else out.view(1)
    element = format.element
    choice = choose("dequantize_blocks", out.device, backend, asked=element, tensors=(values, out))
    parts = Parts(values=values, scales=scales, tensor_scale=tensor_scale)
    choice.function(target, parts, format, dim)


# In a graph; halfstep.ops.custom says how.


def _eager(
    values: Tensor,
    scales: Tensor,
    tensor_scale: Tensor,
    edge: Tensor | None,
    shape: list[int],
    dim: int,
    format: str,
    backend: str,
    dtype: torch.dtype,
) -> Tensor:
    out = torch.empty(shape, dtype=dtype, device=values.device)
    it = value_of(format, BlockFormat.parse)
    _dequantize_into(out, values, scales, tensor_scale, dim, it, Backend.parse(backend))
    return out


def _fake(
    values: Tensor, scales: Tensor, tensor_scale: Tensor, edge: Any, shape: list[int], *rest: Any
) -> Tensor:
    return values.new_empty(shape, dtype=rest[-1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    edge = inputs[3]
    ctx.dtype = None if edge is None else edge.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    to_edge = None if ctx.dtype is None else grad.to(ctx.dtype)
    return None, None, None, to_edge, None, None, None, None, None


_node = operator(
    "dequantize_blocks",
    "(Tensor values, Tensor scales, Tensor tensor_scale, Tensor? edge, SymInt[] shape, int dim, "
    "str format, str backend, ScalarType dtype) -> Tensor",
    _eager,
    fake=_fake,
    backward=_backward,
    setup=_save,
)


class _Join(torch.autograd.Function):
    """The number, with the gradient of the edge."""

    @staticmethod
    def forward(edge: Tensor, number: Tensor) -> Tensor:
        return number.view_as(number)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].to(ctx.dtype), None


def _check_out(out: object, shape: torch.Size, device: torch.device, dtype: object) -> None:
    if not isinstance(out, Tensor) or out.dtype not in CARRIERS or dtype not in (None, out.dtype):
        given = f"{out.dtype}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
        raise OperandError(
            f"dequantize: out is {given}; allowed: a tensor of float32, float64, float16 or "
            "bfloat16, and of dtype= where that is given"
        )
    if out.shape != shape or out.device != device:
        raise OperandError(
            f"dequantize: out is {tuple(out.shape)} on {out.device}; "
            f"wanted: {tuple(shape)} on {device}"
        )


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ModuleNotFoundError:
        raise HalfstepError(
            "block tensors are saved with safetensors, which is not installed: "
            "pip install 'halfstep[files]'"
        ) from None
    return safetensors.torch


def _write_whole(path: Path, data: bytes) -> None:
    """The file is there with all of the data, or as it was before."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
