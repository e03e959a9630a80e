"""The recipes that store and multiply in 16 bits, and their ablations: one literal each, its paper cited."""

from __future__ import annotations

from halfstep.format import Accumulator, Format
from halfstep.recipe.loss_scaling import LossScaling, ScalingKind
from halfstep.recipe.policies import AMP, PAPER
from halfstep.recipe.recipe import Recipe, Update

__all__ = ["SIXTEEN_BITS"]

_FP32 = Format.parse("fp32")
_BF16 = Format.parse("bf16")
_FP16 = Format.parse("fp16")
_ADDS_FP32 = Accumulator.parse("fp32")
_UNSCALED = LossScaling(kind=ScalingKind.NONE)
_DYNAMIC = LossScaling(kind=ScalingKind.DYNAMIC)

SIXTEEN_BITS = (
    Recipe(
        name="fp32",
        summary="plain FP32: nothing is changed",
        source="IEEE 754-2019, binary32",
        weight=_FP32,
        activation=_FP32,
        gradient=_FP32,
        store=_FP32,
        accumulate=_ADDS_FP32,
        master=_FP32,
        optimizer=_FP32,
        loss_scaling=_UNSCALED,
        policy=AMP,
    ),
    Recipe(
        name="bf16",
        summary="BF16 storage and multiplication, FP32 accumulation and master weights; "
        "BF16 has FP32's range, so no loss scale",
        source="Kalamkar et al., A Study of BFLOAT16 for Deep Learning Training, "
        "arXiv 1905.12322 (not checked)",
        weight=_BF16,
        activation=_BF16,
        gradient=_BF16,
        store=_BF16,
        accumulate=_ADDS_FP32,
        master=_FP32,
        optimizer=_FP32,
        loss_scaling=_UNSCALED,
        policy=AMP,
    ),
    Recipe(
        name="fp16",
        summary="FP16 storage and multiplication, FP32 accumulation and master weights, "
        "dynamic loss scale",
        source="Micikevicius et al., Mixed Precision Training, arXiv 1710.03740",
        weight=_FP16,
        activation=_FP16,
        gradient=_FP16,
        store=_FP16,
        accumulate=_ADDS_FP32,
        master=_FP32,
        optimizer=_FP32,
        loss_scaling=_DYNAMIC,
        policy=AMP,
    ),
    Recipe(
        name="bf16-pure",
        summary="plain model.bfloat16(): every tensor, the parameters and the optimizer in BF16, "
        "to nearest: small updates vanish beside the weights",
        source="what Zamirai et al., Revisiting BFloat16 Training, arXiv 2010.06192, finds to fail",
        weight=_BF16,
        activation=_BF16,
        gradient=_BF16,
        store=_BF16,
        accumulate=_ADDS_FP32,
        master=_BF16,
        optimizer=_BF16,
        loss_scaling=_UNSCALED,
        policy=PAPER,
    ),
    Recipe(
        name="bf16-sr",
        summary="bf16 with 16-bit weights and moments, the update rounded stochastically: "
        "no master weights",
        source="Zamirai et al., Revisiting BFloat16 Training, arXiv 2010.06192",
        weight=_BF16,
        activation=_BF16,
        gradient=_BF16,
        store=_BF16,
        accumulate=_ADDS_FP32,
        master=_BF16,
        optimizer=_FP32,
        loss_scaling=_UNSCALED,
        policy=AMP,
        update=Update.STOCHASTIC,
        moments=_BF16,
    ),
    Recipe(
        name="bf16-kahan",
        summary="bf16 with 16-bit weights and moments; what the update's rounding loses is kept "
        "in a second 16-bit number: no master weights",
        source="Zamirai et al., Revisiting BFloat16 Training, arXiv 2010.06192",
        weight=_BF16,
        activation=_BF16,
        gradient=_BF16,
        store=_BF16,
        accumulate=_ADDS_FP32,
        master=_BF16,
        optimizer=_FP32,
        loss_scaling=_UNSCALED,
        policy=AMP,
        update=Update.KAHAN,
        moments=_BF16,
    ),
    Recipe(
        name="fp16-naive",
        summary="plain model.half(): every tensor, the parameters and the optimizer in FP16, "
        "no loss scale; dot products still add in FP32, as today's hardware does",
        source="the plain conversion that Micikevicius et al., arXiv 1710.03740, find to fail",
        weight=_FP16,
        activation=_FP16,
        gradient=_FP16,
        store=_FP16,
        accumulate=_ADDS_FP32,
        master=_FP16,
        optimizer=_FP16,
        loss_scaling=_UNSCALED,
        policy=PAPER,
    ),
    Recipe(
        name="fp16-noscale",
        summary="fp16 without the loss scale: small gradients become zero",
        source="ablation of Micikevicius et al., arXiv 1710.03740",
        weight=_FP16,
        activation=_FP16,
        gradient=_FP16,
        store=_FP16,
        accumulate=_ADDS_FP32,
        master=_FP32,
        optimizer=_FP32,
        loss_scaling=_UNSCALED,
        policy=AMP,
    ),
    Recipe(
        name="fp16-nomaster",
        summary="fp16 without the FP32 master weights: small updates vanish beside the weights",
        source="ablation of Micikevicius et al., arXiv 1710.03740, figure 2",
        weight=_FP16,
        activation=_FP16,
        gradient=_FP16,
        store=_FP16,
        accumulate=_ADDS_FP32,
        master=_FP16,
        optimizer=_FP32,
        loss_scaling=_DYNAMIC,
        policy=AMP,
    ),
    Recipe(
        name="fp16-acc16",
        summary="fp16 with dot products that also add in FP16: long sums drift",
        source="ablation of Micikevicius et al., arXiv 1710.03740, section 3.3",
        weight=_FP16,
        activation=_FP16,
        gradient=_FP16,
        store=_FP16,
        accumulate=Accumulator.parse("fp16"),
        master=_FP32,
        optimizer=_FP32,
        loss_scaling=_DYNAMIC,
        policy=AMP,
    ),
    Recipe(
        name="fp16-acc16-chunk64",
        summary="fp16-acc16 in chunks of 64, whose sums are added in FP16, too: long sums hold",
        source="Wang et al., Training Deep Neural Networks with 8-bit Floating "
        "Point Numbers, arXiv 1812.08011; there for FP8 operands",
        weight=_FP16,
        activation=_FP16,
        gradient=_FP16,
        store=_FP16,
        accumulate=Accumulator.parse("fp16/chunk64"),
        master=_FP32,
        optimizer=_FP32,
        loss_scaling=_DYNAMIC,
        policy=AMP,
    ),
    Recipe(
        name="fp16-acc16-pairwise",
        summary="fp16-acc16 with the additions in a tree (a hierarchical reduction): long sums hold",
        source="N. J. Higham, The accuracy of floating point summation, SIAM J. "
        "Sci. Comput. 14(4), 1993 (not checked); the accumulator alone is "
        "of Micikevicius et al., arXiv 1710.03740",
        weight=_FP16,
        activation=_FP16,
        gradient=_FP16,
        store=_FP16,
        accumulate=Accumulator.parse("fp16/pairwise"),
        master=_FP32,
        optimizer=_FP32,
        loss_scaling=_DYNAMIC,
        policy=AMP,
    ),
)
