"""The recipes whose dot products read narrower operands than are stored: one literal each, paper cited."""

from __future__ import annotations

from halfstep.format import Accumulator, BlockFormat, Format, Rounding
from halfstep.recipe.exceptions import Keep
from halfstep.recipe.loss_scaling import LossScaling, ScalingKind
from halfstep.recipe.policies import AMP
from halfstep.recipe.recipe import Recipe, Update

__all__ = ["NARROW_OPERANDS"]

_FP32 = Format.parse("fp32")
_BF16 = Format.parse("bf16")
_FP16 = Format.parse("fp16")
_ADDS_FP32 = Accumulator.parse("fp32")
_E4M3_TENSOR = BlockFormat.parse("e4m3fn@tensor")
_E5M2_TENSOR = BlockFormat.parse("e5m2@tensor")
_UNSCALED = LossScaling(kind=ScalingKind.NONE)

NARROW_OPERANDS = (
    Recipe(
        name="tf32",
        summary="FP32 storage; operands of dot products rounded to TF32 (10 mantissa bits), FP32 sums",
        source="NVIDIA A100 Tensor Core GPU Architecture, white paper 2020 (not checked)",
        weight=Format.parse("tf32"),
        activation=Format.parse("tf32"),
        gradient=Format.parse("tf32"),
        store=_FP32,
        accumulate=_ADDS_FP32,
        master=_FP32,
        optimizer=_FP32,
        loss_scaling=_UNSCALED,
        policy=AMP,
    ),
    Recipe(
        name="fp8",
        summary="BF16 storage; operands of dot products in FP8, E4M3 forward and E5M2 for gradients, "
        "each tensor scaled by its own largest magnitude",
        source="Micikevicius et al., FP8 Formats for Deep Learning, arXiv 2209.05433",
        weight=_E4M3_TENSOR,
        activation=_E4M3_TENSOR,
        gradient=_E5M2_TENSOR,
        store=_BF16,
        accumulate=_ADDS_FP32,
        master=_FP32,
        optimizer=_FP32,
        loss_scaling=_UNSCALED,
        policy=AMP,
    ),
    Recipe(
        name="fp8-delayed",
        summary="fp8 whose scales come from the largest magnitudes of 1024 past steps; attention's "
        "products stay in BF16",
        source="NVIDIA Transformer Engine, recipe DelayedScaling (Format.HYBRID, "
        "history 1024, max); the formats: arXiv 2209.05433",
        weight=_E4M3_TENSOR,
        activation=_E4M3_TENSOR,
        gradient=_E5M2_TENSOR,
        store=_BF16,
        accumulate=_ADDS_FP32,
        master=_FP32,
        optimizer=_FP32,
        loss_scaling=_UNSCALED,
        policy=AMP,
        keep=Keep.parse("products"),
        amax_history=1024,
    ),
    Recipe(
        name="fp8-rowwise",
        summary="BF16 storage; operands in E4M3, one scale for all that one element of the result "
        "sums over; attention's products stay in BF16",
        source="torchao.float8, recipe rowwise; per-token and per-channel scales: "
        "Xi et al., arXiv 2410.19313 (not checked)",
        weight=BlockFormat.parse("e4m3fn@row"),
        activation=BlockFormat.parse("e4m3fn@row"),
        gradient=BlockFormat.parse("e4m3fn@row"),
        store=_BF16,
        accumulate=_ADDS_FP32,
        master=_FP32,
        optimizer=_FP32,
        loss_scaling=_UNSCALED,
        policy=AMP,
        keep=Keep.parse("products"),
    ),
    Recipe(
        name="fp8-block",
        summary="BF16 storage; operands in E4M3, scaled by 1x128 (activations, gradients) and 128x128"
        " (weights); sums of 14 bits, in FP32 every 128; attention and head stay in BF16",
        source="DeepSeek-V3 Technical Report, arXiv 2412.19437",
        weight=BlockFormat.parse("e4m3fn@128x128"),
        activation=BlockFormat.parse("e4m3fn@1x128"),
        gradient=BlockFormat.parse("e4m3fn@1x128"),
        store=_BF16,
        accumulate=Accumulator.parse("e8m13/toward_zero/chunk128/between-fp32"),
        master=_FP32,
        optimizer=_FP32,
        loss_scaling=_UNSCALED,
        policy=AMP,
        keep=Keep.parse("products+last"),
    ),
    Recipe(
        name="fp8-chunk64",
        summary="FP16 storage; operands in FP8 (1-5-2), sums in 1-6-9 by chunks of 64, a loss scale "
        "of 1024; weights in 1-6-9, their update rounded stochastically; the first and the last layer "
        "stay in FP16",
        source="Wang et al., Training Deep Neural Networks with 8-bit Floating "
        "Point Numbers, arXiv 1812.08011",
        weight=Format.parse("e5m2"),
        activation=Format.parse("e5m2"),
        gradient=Format.parse("e5m2"),
        store=_FP16,
        accumulate=Accumulator.parse("e6m9/chunk64"),
        master=Format.parse("e6m9"),
        optimizer=_FP32,
        loss_scaling=LossScaling(kind=ScalingKind.DYNAMIC, initial=1024.0),
        policy=AMP,
        keep=Keep.parse("first+last"),
        update=Update.STOCHASTIC,
    ),
    Recipe(
        name="mxfp8",
        summary="BF16 storage; operands in MXFP8 (E4M3 in blocks of 32 that share a power of two), "
        "gradients too",
        source="Rouhani et al., Microscaling Data Formats for Deep Learning, arXiv "
        "2310.10537 (not checked); E4M3 for gradients: Mishra et al., arXiv "
        "2506.08027",
        weight=BlockFormat.parse("mxfp8_e4m3"),
        activation=BlockFormat.parse("mxfp8_e4m3"),
        gradient=BlockFormat.parse("mxfp8_e4m3"),
        store=_BF16,
        accumulate=_ADDS_FP32,
        master=_FP32,
        optimizer=_FP32,
        loss_scaling=_UNSCALED,
        policy=AMP,
    ),
    Recipe(
        name="mxfp6",
        summary="BF16 storage; operands in MXFP6 (E3M2 in blocks of 32 that share a power of two)",
        source="Rouhani et al., Microscaling Data Formats for Deep Learning, arXiv "
        "2310.10537 (not checked)",
        weight=BlockFormat.parse("mxfp6_e3m2"),
        activation=BlockFormat.parse("mxfp6_e3m2"),
        gradient=BlockFormat.parse("mxfp6_e3m2"),
        store=_BF16,
        accumulate=_ADDS_FP32,
        master=_FP32,
        optimizer=_FP32,
        loss_scaling=_UNSCALED,
        policy=AMP,
    ),
    Recipe(
        name="mxfp4",
        summary="BF16 storage; operands in MXFP4 (E2M1 in blocks of 32 that share a power of two), "
        "gradients rounded stochastically",
        source="OCP Microscaling Formats (MX) v1.0; stochastic gradients: Tseng et "
        "al., Training LLMs with MXFP4, arXiv 2502.20586 (not checked)",
        weight=BlockFormat.parse("mxfp4"),
        activation=BlockFormat.parse("mxfp4"),
        gradient=BlockFormat.parse("mxfp4"),
        store=_BF16,
        accumulate=_ADDS_FP32,
        master=_FP32,
        optimizer=_FP32,
        loss_scaling=_UNSCALED,
        policy=AMP,
        gradient_rounding=Rounding.STOCHASTIC,
    ),
    Recipe(
        name="nvfp4",
        summary="BF16 storage; operands in NVFP4: blocks of 16, weights in tiles of 16x16; Hadamard "
        "transform for weight gradients, stochastic gradients; attention and the last 15 % of"
        " layers stay in BF16",
        source="NVIDIA, Pretraining Large Language Models with NVFP4, arXiv 2509.25149",
        weight=BlockFormat.parse("nvfp4@16x16"),
        activation=BlockFormat.parse("nvfp4"),
        gradient=BlockFormat.parse("nvfp4"),
        store=_BF16,
        accumulate=_ADDS_FP32,
        master=_FP32,
        optimizer=_FP32,
        loss_scaling=_UNSCALED,
        policy=AMP,
        keep=Keep.parse("products+last15%"),
        hadamard=16,
        gradient_rounding=Rounding.STOCHASTIC,
    ),
    Recipe(
        name="int8",
        summary="BF16 storage; operands in INT8, tiles of 32x32 scaled by their largest magnitude; "
        "attention's products stay in BF16",
        source="Xi et al., Jetfire: Efficient and Accurate Transformer Pretraining "
        "with INT8 Data Flow and Per-Block Quantization, arXiv 2403.12422",
        weight=BlockFormat.parse("int8@32x32"),
        activation=BlockFormat.parse("int8@32x32"),
        gradient=BlockFormat.parse("int8@32x32"),
        store=_BF16,
        accumulate=_ADDS_FP32,
        master=_FP32,
        optimizer=_FP32,
        loss_scaling=_UNSCALED,
        policy=AMP,
        keep=Keep.parse("products"),
    ),
    Recipe(
        name="binary",
        summary="FP32 storage; weights and activations by their sign, gradients straight through "
        "between -1 and 1; the first and the last layer and attention stay in FP32",
        source="Hubara et al., Binarized Neural Networks, arXiv 1602.02830 (not "
        "checked); first and last layer: Rastegari et al., XNOR-Net, arXiv "
        "1603.05279 (not checked)",
        weight=Format.parse("binary"),
        activation=Format.parse("binary"),
        gradient=_FP32,
        store=_FP32,
        accumulate=_ADDS_FP32,
        master=_FP32,
        optimizer=_FP32,
        loss_scaling=_UNSCALED,
        policy=AMP,
        keep=Keep.parse("products+first+last"),
    ),
    Recipe(
        name="int8-inference",
        summary="inference: weights in INT8 with a scale for each output, activations in INT8 with a "
        "scale for each tensor",
        source="Krishnamoorthi, Quantizing deep convolutional networks for "
        "efficient inference, arXiv 1806.08342 (not checked)",
        weight=BlockFormat.parse("int8@row:symmetric"),
        activation=BlockFormat.parse("int8@tensor:symmetric"),
        gradient=_FP32,
        store=_FP32,
        accumulate=_ADDS_FP32,
        master=_FP32,
        optimizer=_FP32,
        loss_scaling=_UNSCALED,
        policy=AMP,
        keep=Keep.parse("products"),
        inference_only=True,
    ),
    Recipe(
        name="int4-inference",
        summary="inference: weights in INT4, scaled by 128, activations in BF16",
        source="Lin et al., AWQ, arXiv 2306.00978 (not checked; groups of 128, "
        "here without its search)",
        weight=BlockFormat.parse("int4@1x128"),
        activation=_BF16,
        gradient=_BF16,
        store=_BF16,
        accumulate=_ADDS_FP32,
        master=_FP32,
        optimizer=_FP32,
        loss_scaling=_UNSCALED,
        policy=AMP,
        keep=Keep.parse("products"),
        inference_only=True,
    ),
    Recipe(
        name="binary-inference",
        summary="inference with a model trained in binary: weights and activations by their sign, the"
        " first and the last layer in FP32",
        source="Rastegari et al., XNOR-Net, arXiv 1603.05279 (not checked); "
        "without its scales, as in BinaryConnect",
        weight=Format.parse("binary"),
        activation=Format.parse("binary"),
        gradient=_FP32,
        store=_FP32,
        accumulate=_ADDS_FP32,
        master=_FP32,
        optimizer=_FP32,
        loss_scaling=_UNSCALED,
        policy=AMP,
        keep=Keep.parse("products+first+last"),
        inference_only=True,
    ),
)
