"""The operands of a dot product, rounded by their roles: weight, activation, gradient.

A block format has its blocks along the axis that the product sums over, so one tensor may be rounded
along one axis for one product and along the other for the next.
"""

from __future__ import annotations

from enum import Enum
from functools import cache

import torch
from torch import Tensor

from halfstep import ops
from halfstep.format import BlockFormat, Format, Kind, Rounding
from halfstep.ops.custom import operator
from halfstep.recipe import Recipe
from halfstep.switching.amax_history import AmaxHistories
from halfstep.switching.tracing import is_tracing

__all__ = ["Operands", "Product", "Role", "Site"]


class Role(Enum):
    """What a tensor is in the region."""

    WEIGHT = "weight"
    ACTIVATION = "activation"
    GRADIENT = "gradient"


class Product(Enum):
    """The three dot products of a layer, by the roles of their operands."""

    FORWARD = (Role.ACTIVATION, Role.WEIGHT)
    GRAD_INPUT = (Role.GRADIENT, Role.WEIGHT)
    GRAD_WEIGHT = (Role.GRADIENT, Role.ACTIVATION)


class Site:
    """The tensors of one dot product of the program, which keep their scales from forward to backward."""

    __slots__ = ("name", "named", "scales")

    def __init__(self, name: str, *, named: bool = True) -> None:
        self.name = name
        self.named = named
        """True where the name is a parameter's: the same in every step, and of no other tensor."""
        self.scales: dict[str, Tensor] = {}


class Operands:
    """Rounds operands to the formats of a recipe; what it keeps from step to step is the histories."""

    __slots__ = ("_formats", "_gradient_rounding", "_in_blocks", "_store", "hadamard", "histories")

    def __init__(self, recipe: Recipe) -> None:
        self._store = recipe.store
        self._formats = {role: getattr(recipe, role.value) for role in Role}
        self._gradient_rounding = recipe.gradient_rounding
        self.hadamard = recipe.hadamard
        self.histories = AmaxHistories(recipe.amax_history)
        self._in_blocks = {
            role: ops.block_rounder(format)
            for role, format in self._formats.items()
            if isinstance(format, BlockFormat)
            and not (self.histories.window or self.is_stochastic(role))
        }

    def format(self, role: Role) -> Format | BlockFormat:
        """The operand format of a role."""
        return self._formats[role]

    def is_stochastic(self, role: Role) -> bool:
        """True where a role's operands are rounded by random bits."""
        return role is Role.GRADIENT and self._gradient_rounding is Rounding.STOCHASTIC

    def clips(self, role: Role) -> bool:
        """True where the gradient of the rounding is straight through only between -1 and 1."""
        format = self._formats[role]
        element = format.element if isinstance(format, BlockFormat) else format
        return element.kind is Kind.BINARY

    @property
    def ignores_axes(self) -> bool:
        """True where a tensor is rounded alike for all of its products."""
        return not self.hadamard and all(
            isinstance(format, Format) or not format.rows for format in self._formats.values()
        )

    def rounded(self, t: Tensor, role: Role, dim: int, site: Site) -> Tensor:
        """``t`` on its role's grid, carried in FP32, blocks along ``dim``; without a graph.

        NaN and infinity stay visible: a block that has one is NaN, a saturating format has none.
        """
        format = self._formats[role]
        in_blocks = self._in_blocks.get(role)
        if in_blocks is not None and t.dtype is torch.float32 and t.dim() in (1, 2):
            return in_blocks(t, dim)
        if format == self._store:
            return t.detach().float()
        if not t.is_contiguous() and t.dim() >= 2 and t.mT.is_contiguous():
            # A transposed view: the kernels are ten times faster along memory.
            swapped = {t.dim() - 1: -2, t.dim() - 2: -1}.get(dim % t.dim(), dim)
            return self.rounded(t.mT, role, swapped, site).mT
        wide = t.detach().to(torch.float32)
        if is_tracing():
            out = None  # the compiler sees to its memory
        else:
            out = torch.empty_like(wide) if wide.data_ptr() == t.data_ptr() else wide
        rounding = Rounding.STOCHASTIC if self.is_stochastic(role) else Rounding.NEAREST
        if isinstance(format, Format):
            return ops.round_to(wide, format, rounding, out)
        if self.histories.window:
            name = f"{site.name}.{role.value}"
            return self._delayed(wide, torch.empty_like(wide), format, rounding, name, site)
        return ops.round_blocks(wide, format, dim, rounding, out)

    def _delayed(
        self,
        wide: Tensor,
        out: Tensor,
        format: BlockFormat,
        rounding: Rounding,
        name: str,
        site: Site,
    ) -> Tensor:
        scale = site.scales.get(name)
        if scale is None:
            scale = self.histories.scale(name, format.element.max, wide.device)
            site.scales[name] = scale
        amax = wide.abs().amax() if wide.numel() else wide.new_zeros(())
        self.histories.note(name, amax)
        torch.div(wide, scale, out=out)
        # What is not finite makes all NaN, as in a block: saturation would hide it.
        visible = torch.where(amax.isfinite(), scale, float("nan"))
        return ops.round_to(out, format.element, rounding, out).mul_(visible)

    def transformed(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Both operands of ``a @ b`` after a random Hadamard transform of what is summed over.

        Tiles of ``hadamard`` along the last axis of a (..., M, K) and the last but one of b (..., K, N), K
        filled up with zeros. The transform is orthonormal: without rounding the product is the same; with
        it, outliers are spread over a tile (arXiv 2509.25149, section 4.2). Signs are fixed.
        """
        return self._mixed(a.mT).mT, self._mixed(b)

    def _mixed(self, t: Tensor) -> Tensor:
        """The transform along the last but one axis, which is the fast one: one matrix a tile."""
        size = self.hadamard
        t = t.detach().float()
        short = -t.size(-2) % size
        if short:
            t = torch.nn.functional.pad(t, (0, 0, 0, short))
        h = _hadamard_node(t, size) if is_tracing() else _hadamard(size).to(t.device)
        return (h @ t.unflatten(-2, (-1, size))).flatten(-3, -2)


_SIGN_SEED = 2509_25149


@cache
def _hadamard(size: int) -> Tensor:
    """An orthonormal Hadamard matrix with random signs, the same in every run."""
    h = torch.ones(1, 1)
    while h.size(0) < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    generator = torch.Generator().manual_seed(_SIGN_SEED)
    signs = torch.randint(0, 2, (size,), generator=generator) * 2 - 1
    return h * signs / size**0.5


_hadamard_node = operator(
    "hadamard",
    "(Tensor like, int size) -> Tensor",
    lambda like, size: _hadamard(size).to(like.device, copy=True),
    fake=lambda like, size: like.new_empty(size, size),
)
"""`_hadamard` on the device of ``like``, in a graph, where no tensor is known beforehand."""
