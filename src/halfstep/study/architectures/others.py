"""Rows of everything but language: images, sound, diffusion, time series, proteins, control."""

from __future__ import annotations

from halfstep.study.architectures import batches
from halfstep.study.architectures.architecture import Architecture, Kind
from halfstep.study.architectures.language import MARKS, SEQ2SEQ, TEXT

__all__ = ["OTHERS"]

_LABELS = {"num_labels": batches.CLASSES}
_VIT = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": 32,
    "patch_size": 8,
} | _LABELS
_SOUND = {
    "vocab_size": 32,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "conv_dim": (32, 32, 32),
    "conv_kernel": (10, 3, 3),
    "conv_stride": (5, 4, 2),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "mask_time_length": 2,
    "ctc_loss_reduction": "mean",
}

OTHERS = (
    # -- vision --------------------------------------------------------------------------------
    Architecture(
        name="vit",
        kind=Kind.VISION,
        model="ViTForImageClassification",
        config="ViTConfig",
        options=_VIT,
        batch=batches.classified_images,
    ),
    Architecture(
        name="swin",
        kind=Kind.VISION,
        model="SwinForImageClassification",
        config="SwinConfig",
        options={
            "image_size": 32,
            "patch_size": 2,
            "embed_dim": 32,
            "depths": [2, 2],
            "num_heads": [2, 4],
            "window_size": 4,
        }
        | _LABELS,
        batch=batches.classified_images,
    ),
    Architecture(
        name="convnext",
        kind=Kind.VISION,
        model="ConvNextForImageClassification",
        config="ConvNextConfig",
        options={"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1]} | _LABELS,
        batch=batches.classified_images,
    ),
    Architecture(
        name="resnet",
        kind=Kind.VISION,
        model="ResNetForImageClassification",
        config="ResNetConfig",
        options={"embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [1, 1, 1]}
        | {"layer_type": "basic"}
        | _LABELS,
        batch=batches.many_classified_images,
    ),
    Architecture(
        name="efficientnet",
        kind=Kind.VISION,
        model="EfficientNetForImageClassification",
        config="EfficientNetConfig",
        options={
            "image_size": 32,
            "width_coefficient": 0.5,
            "depth_coefficient": 0.3,
            "hidden_dim": 640,
            "dropout_rate": 0.0,
        }
        | _LABELS,
        batch=batches.classified_images,
    ),
    Architecture(
        name="mobilevit",
        kind=Kind.VISION,
        model="MobileViTForImageClassification",
        config="MobileViTConfig",
        options={
            "image_size": 64,
            "hidden_sizes": [32, 48, 64],
            "neck_hidden_sizes": [8, 16, 24, 32, 48, 64, 96],
        }
        | _LABELS,
        batch=batches.many_classified_images,
        # At 1e-3 all images still have one answer, to 1e-5, after 20 steps: FP32's seeds then differ
        # by less than one rounding of it in 8 bits.
        rate=1e-2,
    ),
    Architecture(
        name="mobilenet-v2",
        kind=Kind.VISION,
        model="MobileNetV2ForImageClassification",
        config="MobileNetV2Config",
        options={"image_size": 64, "depth_multiplier": 0.35} | _LABELS,
        batch=batches.many_classified_images,
    ),
    Architecture(
        name="vit-mae",
        kind=Kind.VISION,
        model="ViTMAEForPreTraining",
        config="ViTMAEConfig",
        options={
            **{k: v for k, v in _VIT.items() if k != "num_labels"},
            "decoder_hidden_size": 32,
            "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 64,
        },
        batch=batches.images,
    ),
    Architecture(
        name="segformer",
        kind=Kind.SEGMENTATION,
        model="SegformerForSemanticSegmentation",
        config="SegformerConfig",
        options={
            "hidden_sizes": [16, 32, 48, 64],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 3, 4],
            "decoder_hidden_size": 32,
        }
        | _LABELS,
        batch=batches.segmentation,
    ),
    Architecture(
        name="detr",
        kind=Kind.DETECTION,
        model="DetrForObjectDetection",
        config="DetrConfig",
        options={
            "use_timm_backbone": False,
            "use_pretrained_backbone": False,
            "backbone": None,
            "num_queries": 8,
            "d_model": 64,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 128,
            "decoder_ffn_dim": 128,
        }
        | _LABELS,
        nested={
            "backbone_config": (
                "ResNetConfig",
                {
                    "embedding_size": 16,
                    "hidden_sizes": [16, 32, 48, 64],
                    "depths": [1, 1, 1, 1],
                    "layer_type": "basic",
                    "out_features": ["stage4"],
                },
            )
        },
        batch=batches.detections,
    ),
    Architecture(
        name="yolos",
        kind=Kind.DETECTION,
        model="YolosForObjectDetection",
        config="YolosConfig",
        options=_VIT | {"image_size": [64, 64], "num_detection_tokens": 8},
        batch=batches.detections,
    ),
    # -- images and texts ----------------------------------------------------------------------
    Architecture(
        name="clip",
        kind=Kind.IMAGE_TEXT,
        model="CLIPModel",
        config="CLIPConfig",
        options={
            "text_config": TEXT | MARKS | {"eos_token_id": batches.VOCABULARY - 1},
            "vision_config": {k: v for k, v in _VIT.items() if k != "num_labels"},
            "projection_dim": 32,
        },
        batch=batches.matched_pairs,
    ),
    # -- speech and sound ----------------------------------------------------------------------
    Architecture(
        name="wav2vec2",
        kind=Kind.SPEECH,
        model="Wav2Vec2ForCTC",
        config="Wav2Vec2Config",
        options=_SOUND,
        batch=batches.spoken,
    ),
    Architecture(
        name="wav2vec2-conformer",
        kind=Kind.SPEECH,
        model="Wav2Vec2ConformerForCTC",
        config="Wav2Vec2ConformerConfig",
        options=_SOUND | {"conv_depthwise_kernel_size": 7},
        batch=batches.spoken,
    ),
    Architecture(
        name="whisper",
        kind=Kind.SPEECH,
        model="WhisperForConditionalGeneration",
        config="WhisperConfig",
        options={k: v for k, v in SEQ2SEQ.items() if k != "max_position_embeddings"}
        | {"max_source_positions": 32, "max_target_positions": 32},
        batch=batches.spectrogram_to_text,
    ),
    Architecture(
        name="audio-spectrogram-transformer",
        kind=Kind.SOUND,
        model="ASTForAudioClassification",
        config="ASTConfig",
        options={k: v for k, v in _VIT.items() if k != "image_size"}
        | {"max_length": 64, "num_mel_bins": 32, "frequency_stride": 8, "time_stride": 8},
        batch=batches.sound_classes,
    ),
    # -- diffusion -----------------------------------------------------------------------------
    Architecture(
        name="unet-2d",
        kind=Kind.DIFFUSION,
        library="diffusers",
        model="UNet2DModel",
        config="UNet2DModel",
        options={
            "sample_size": 16,
            "block_out_channels": (32, 64),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 1,
            "norm_num_groups": 8,
        },
        batch=batches.diffusion,
    ),
    Architecture(
        name="unet-2d-condition",
        kind=Kind.DIFFUSION,
        library="diffusers",
        model="UNet2DConditionModel",
        config="UNet2DConditionModel",
        options={
            "sample_size": 16,
            "block_out_channels": (32, 64),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "cross_attention_dim": 32,
        },
        batch=batches.latent_diffusion,
    ),
    Architecture(
        name="autoencoder-kl",
        kind=Kind.DIFFUSION,
        library="diffusers",
        model="AutoencoderKL",
        config="AutoencoderKL",
        options={
            "block_out_channels": (16, 32),
            "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
            "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
            "norm_num_groups": 8,
        },
        batch=batches.autoencoding,
    ),
    # -- time series, proteins, control --------------------------------------------------------
    Architecture(
        name="time-series-transformer",
        kind=Kind.SERIES,
        model="TimeSeriesTransformerForPrediction",
        config="TimeSeriesTransformerConfig",
        options={
            "prediction_length": 8,
            "context_length": 24,
            "lags_sequence": [1, 2, 7],
            "num_time_features": 2,
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 1,
        },
        batch=batches.series,
    ),
    Architecture(
        name="patchtst",
        kind=Kind.SERIES,
        model="PatchTSTForPrediction",
        config="PatchTSTConfig",
        options={
            "num_input_channels": 3,
            "context_length": 64,
            "prediction_length": 16,
            "patch_length": 8,
            "patch_stride": 8,
            "d_model": 32,
            "num_attention_heads": 4,
            "ffn_dim": 64,
            "num_hidden_layers": 2,
        },
        batch=batches.patched_series,
    ),
    Architecture(
        name="esm",
        kind=Kind.PROTEIN,
        model="EsmForMaskedLM",
        config="EsmConfig",
        options=TEXT | {"pad_token_id": 1, "mask_token_id": 4, "position_embedding_type": "rotary"},
        batch=batches.masked_words,
    ),
    Architecture(
        name="decision-transformer",
        kind=Kind.CONTROL,
        model="DecisionTransformerModel",
        config="DecisionTransformerConfig",
        options={"state_dim": 6, "act_dim": 3, "hidden_size": 64, "n_layer": 2, "n_head": 4}
        | {"max_ep_len": 16}
        | MARKS,
        batch=batches.trajectories,
        answer="action_preds",
    ),
)
