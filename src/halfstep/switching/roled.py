"""Dot products whose operands are rounded by role: three products a layer, each along its own axis.

::

    output = Q(a) @ Q(b)                 blocks along K
    grad_a = Q(grad) @ Q(b).T            blocks along N
    grad_b = Q(a).T @ Q(grad)            blocks along M: the batch, for a weight b

Operands come in the store dtype and are kept so for the backward; each product is exact, summed in FP32 or
the recipe's accumulator, and rounded once to the store dtype. The backward is made of the same function, so
that it can be differentiated again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from halfstep.format import Accumulator
from halfstep.switching.emulated import Emulator
from halfstep.switching.operands import Operands, Product, Role, Site
from halfstep.switching.products import matmul, repeated_rows, wide_rows
from halfstep.switching.tracing import is_tracing

__all__ = ["RoledEmulator", "Spec", "Weights", "clipped", "rounded"]


class Weights:
    """Rounded weights that several readers of one forward share; others are not kept.

    A weight is known to be shared from the second forward on: to keep each until the region is left would
    cost four bytes a parameter.
    """

    __slots__ = ("_kept", "_seen", "_shared", "open")

    def __init__(self, shared: set[Any]) -> None:
        self._shared = shared
        self._seen: set[Any] = set()
        self._kept: dict[Any, Tensor] = {}
        self.open = True

    def rounded(self, operands: Operands, t: Tensor, dim: int, site: Site) -> Tensor:
        """As `Operands.rounded`; what is there where this forward has done it already."""
        key = (site.name, dim, t.shape, t.stride(), t.storage_offset())
        if not self.open or not site.named or key not in self._shared:
            if self.open and key in self._seen:
                self._shared.add(key)
            self._seen.add(key)
            return operands.rounded(t, Role.WEIGHT, dim, site)
        out = self._kept.get(key)
        if out is None:
            out = self._kept[key] = operands.rounded(t, Role.WEIGHT, dim, site)
        return out

    def close(self) -> None:
        """The region is left."""
        self.open = False
        self._kept.clear()
        self._seen.clear()


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What a product is besides its numbers."""

    emulator: RoledEmulator
    roles: tuple[Role, Role]
    site: Site
    wide: bool = False
    """The result is FP32, to be rounded later."""
    of_weight: bool = False
    """It is the gradient of a weight: the recipe may transform its operands."""

    def backward(self, a: Role, b: Role, *, of_weight: bool) -> Spec:
        """A product of the backward; its result is stored."""
        return Spec(emulator=self.emulator, roles=(a, b), site=self.site, of_weight=of_weight)


class _Dot(Function):
    """``a @ b + bias``: a (..., M, K), b (..., K, N) in the store dtype, of the same batch."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, bias: Tensor | None, spec: Spec) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.spec, ctx.bias_dtype = spec, None if bias is None else bias.dtype
        emulator = spec.emulator
        if spec.of_weight and emulator.operands.hadamard:
            a, b = emulator.operands.transformed(a, b)
        qa = emulator.rounded(a, spec.roles[0], -1, spec.site)
        qb = emulator.rounded(b, spec.roles[1], -2, spec.site)
        if qa.dim() == 2:
            out = wide_rows(qa, qb.t(), emulator.accumulate)
        else:
            out = matmul(qa, qb, emulator.accumulate)
        if bias is not None:
            out += bias
        return out if spec.wide else out.to(emulator.low)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        a, b = ctx.saved_tensors
        spec: Spec = ctx.spec
        role_a, role_b = spec.roles
        of_a = of_b = of_bias = None
        if ctx.needs_input_grad[0]:
            back = spec.backward(Role.GRADIENT, role_b, of_weight=role_a is Role.WEIGHT)
            of_a = clipped(_Dot.apply(grad, b.mT, None, back), a, role_a, spec.emulator)
        if ctx.needs_input_grad[1]:
            back = spec.backward(role_a, Role.GRADIENT, of_weight=role_b is Role.WEIGHT)
            of_b = clipped(_Dot.apply(a.mT, grad, None, back), b, role_b, spec.emulator)
        if ctx.needs_input_grad[2]:
            of_bias = grad.float().flatten(0, -2).sum(0).to(ctx.bias_dtype)
        return of_a, of_b, of_bias, None


def clipped(grad: Any, of: Tensor, role: Role, emulator: RoledEmulator) -> Tensor:
    """The gradient through the rounding: as it is, or zero where a sign was taken beyond -1 and 1."""
    grad = grad.to(of.dtype)
    return grad * (of.abs() <= 1) if emulator.operands.clips(role) else grad


class _Rounded(Function):
    """``t`` on the grid of its role in FP32; its gradient is straight through, clipped where it must be."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, role: Role, dim: int, site: Site, emulator: Any) -> Tensor:
        ctx.role, ctx.emulator = role, emulator
        ctx.save_for_backward(t)
        return emulator.rounded(t, role, dim, site)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (t,) = ctx.saved_tensors
        return clipped(grads[0], t, ctx.role, ctx.emulator), None, None, None, None


def rounded(t: Tensor, role: Role, dim: int, site: Site, emulator: RoledEmulator) -> Any:
    """``t`` on the grid of its role in FP32, with a graph: straight through."""
    return _Rounded.apply(t, role, dim, site, emulator)


class _RoundedGradient(Function):
    """A result as it is, whose gradient is rounded as the operand that it becomes."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, dim: int, site: Site, emulator: Any) -> Tensor:
        ctx.dim, ctx.site, ctx.emulator = dim, site, emulator
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        grad: Any = _Rounded.apply(grads[0], Role.GRADIENT, ctx.dim, ctx.site, ctx.emulator)
        return grad, None, None, None


class RoledEmulator(Emulator):
    """An `Emulator` that rounds operands by role; one a region, since it knows the region's weights.

    ``weight_name`` gives the name of the parameter that a tensor is the working copy of, or a view of it;
    "" for others.
    """

    __slots__ = ("_count", "_layer", "_name_of", "operands", "weights")

    def __init__(
        self,
        low: torch.dtype,
        accumulate: Accumulator,
        operands: Operands,
        weights: Weights,
        weight_name: Callable[[Tensor], str],
    ) -> None:
        super().__init__(low, accumulate)
        self.operands = operands
        self.weights = weights
        self._name_of = weight_name
        self._count = 0
        self._layer = Site("")

    def role_of(self, t: Tensor) -> Role:
        """Weight or activation: what a tensor of a forward is."""
        return Role.WEIGHT if self._name_of(t) else Role.ACTIVATION

    def site(self, *tensors: Tensor) -> Site:
        """The place in the program where these are multiplied: by the weight, or counted."""
        name = next(filter(None, map(self._name_of, tensors)), "")
        if name:
            return Site(name)
        self._count += 1
        return Site(f"product {self._count}", named=False)

    def rounded(self, t: Tensor, role: Role, dim: int, site: Site) -> Tensor:
        """``t`` on its role's grid, carried in FP32, blocks along ``dim``; without a graph."""
        if role is Role.WEIGHT and not is_tracing():
            return self.weights.rounded(self.operands, t, dim, site)
        return self.operands.rounded(t, role, dim, site)

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """``torch.matmul`` with operands rounded by role; FP32, not rounded to the store format."""
        return self.multiplied(a, b, wide=True)

    def multiplied(self, a: Tensor, b: Tensor, *, wide: bool = False) -> Tensor:
        """As `matmul`; rounded to the store format unless ``wide``."""
        a, b = self.lowered(a), self.lowered(b)
        if b.dim() == 1:
            return self.multiplied(a, b.unsqueeze(-1), wide=wide).squeeze(-1)
        if a.dim() == 1:
            return self.multiplied(a.unsqueeze(0), b, wide=wide).squeeze(-2)
        if (
            a.dim() == 2 and b.dim() > 2
        ):  # W @ x: the gradient of W is one dot product over the batch
            return self.multiplied(b.mT, a.t(), wide=wide).mT
        site = self.site(a, b)
        spec = Spec(emulator=self, roles=(self.role_of(a), self.role_of(b)), site=site, wide=wide)
        if b.dim() == 2:
            out: Any = _Dot.apply(a.reshape(math.prod(a.shape[:-1]), a.size(-1)), b, None, spec)
            return out.view(*a.shape[:-1], b.size(-1))
        batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        return _Dot.apply(
            a.expand(*batch, *a.shape[-2:]), b.expand(*batch, *b.shape[-2:]), None, spec
        )  # pyright: ignore[reportReturnType]

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``x @ weight.T + bias``, rounded once; what stands in the weight's place is a weight."""
        x, weight = self.lowered(x), self.lowered(weight)
        bias = None if bias is None else self.lowered(bias)
        role = self.role_of(x)
        spec = Spec(emulator=self, roles=(role, Role.WEIGHT), site=self.site(weight))
        if weight.dim() == 1:
            return self.linear(x, weight.unsqueeze(0), bias).squeeze(-1)
        out: Any = _Dot.apply(
            x.reshape(math.prod(x.shape[:-1]), x.size(-1)), weight.t(), bias, spec
        )
        return out.view(*x.shape[:-1], weight.size(0))

    def along(self, dim: int, tensors: list[Tensor], op: Callable[..., Tensor]) -> Tensor:
        """``op`` of operands rounded along ``dim``, its gradient too: for what is no matrix product.

        FP32, not rounded to the store format.
        """
        tensors = [self.lowered(t) for t in tensors]
        site = self.site(*tensors)
        wide = [_Rounded.apply(t, self.role_of(t), dim, site, self) for t in tensors]
        return self.gradient_rounded(op(*wide), dim, site)

    def gradient_rounded(self, out: Tensor, dim: int, site: Site) -> Tensor:
        """``out`` as it is, whose gradient is rounded along ``dim`` before it goes on."""
        return _RoundedGradient.apply(out, dim, site, self)  # pyright: ignore[reportReturnType]

    # -- recurrent layers: without a graph ----------------------------------------------------------

    def of_layer(self, weight: Tensor) -> RoledEmulator:
        """This emulator for one recurrent layer, which is called by its first weight."""
        layer = RoledEmulator(self.low, self.accumulate, self.operands, self.weights, self._name_of)
        layer._layer = self.site(weight)
        return layer

    def rows(self, a: Tensor, b: Tensor, product: Product = Product.FORWARD) -> Tensor:
        """``a @ b.T`` of FP32 carriers (M, K) and (N, K) with the roles of ``product``; no graph."""
        if product is Product.GRAD_WEIGHT and self.operands.hadamard:
            a, b = self.operands.transformed(a, b.t())
            b = b.t()
        qa = self.operands.rounded(a, product.value[0], -1, self._layer)
        qb = self.operands.rounded(b, product.value[1], -1, self._layer)
        return wide_rows(qa, qb, self.accumulate)

    def repeated(
        self, b: Tensor, count: int, product: Product = Product.FORWARD
    ) -> Callable[[Tensor], Tensor]:
        """`rows` with one ``b``, rounded once, to be called for many ``a`` of about ``count`` rows."""
        role, site = product.value[0], Site(f"{self._layer.name} over time", named=False)
        multiply = repeated_rows(
            self.operands.rounded(b, product.value[1], -1, site), count, self.accumulate
        )
        return lambda a: multiply(self.operands.rounded(a, role, -1, site))
