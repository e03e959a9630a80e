"""The architectures: one row each, of libraries that were not written for halfstep.

A row is a class of `transformers` or `diffusers`, a configuration small enough for a CPU, and what a batch
is. Nothing is downloaded: weights are drawn as the library draws them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from torch import Generator, Tensor, nn

from halfstep.study.architectures import batches

__all__ = ["ARCHITECTURES", "Architecture", "Kind"]


class Kind(StrEnum):
    """What a model is for: the column by which the table is read."""

    ENCODER = "encoder"
    DECODER = "decoder"
    ENCODER_DECODER = "encoder-decoder"
    EXPERTS = "mixture of experts"
    STATE_SPACE = "state space"
    RECURRENT = "recurrent"
    VISION = "vision"
    SEGMENTATION = "segmentation"
    DETECTION = "detection"
    IMAGE_TEXT = "image and text"
    SPEECH = "speech"
    SOUND = "sound"
    DIFFUSION = "diffusion"
    SERIES = "time series"
    PROTEIN = "protein"
    CONTROL = "control"


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A published architecture, small.

    Args:
        name: by which the command line asks for it.
        kind: what it is for.
        model: its class in ``library``.
        config: its configuration class there; the name of the class itself where it takes its
            arguments itself, as in diffusers.
        options: what the configuration is given.
        batch: draws a batch; its keys are the arguments of the model, ``target`` apart.
        answer: the output that is compared with a batch's target, of models without a loss of their own.
        rate: AdamW's.
        nested: options that are configurations themselves: class and options of each.
    """

    name: str
    kind: Kind
    model: str
    config: str
    options: Mapping[str, Any]
    batch: Callable[[Generator], batches.Batch]
    library: str = "transformers"
    answer: str = "sample"
    rate: float = 1e-3
    nested: Mapping[str, tuple[str, Mapping[str, Any]]] = field(
        default_factory=dict[str, tuple[str, Mapping[str, Any]]]
    )

    def build(self) -> nn.Module:
        """The model in training mode, its weights drawn from torch's generator."""
        library = importlib.import_module(self.library)
        cls = getattr(library, self.model)
        options = dict(self.options)
        for option, (config, inner) in self.nested.items():
            options[option] = getattr(library, config)(**inner)
        if self.config == self.model:
            return cls(**options).train()
        return cls(getattr(library, self.config)(**options)).train()

    def loss(self, model: nn.Module, batch: batches.Batch) -> Tensor:
        """The model's own loss; where it has none, the mean squared error of its answer."""
        arguments = dict(batch)
        target = arguments.pop("target", None)
        outputs = model(**arguments)
        if target is None:
            return outputs.loss
        return nn.functional.mse_loss(getattr(outputs, self.answer).float(), target)


_TEXT = {
    "vocab_size": batches.VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
}
_LABELS = {"num_labels": batches.CLASSES}
_MARKS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GPT = {"vocab_size": batches.VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4} | _MARKS
_SEQ2SEQ = {
    "vocab_size": batches.VOCABULARY,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
} | _MARKS
_VIT = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": 32,
    "patch_size": 8,
} | _LABELS
_T5 = {
    "vocab_size": batches.VOCABULARY,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
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

_ROWS = (
    # -- encoders ------------------------------------------------------------------------------
    Architecture(
        name="bert",
        kind=Kind.ENCODER,
        model="BertForMaskedLM",
        config="BertConfig",
        options=_TEXT,
        batch=batches.masked_words,
    ),
    Architecture(
        name="albert",
        kind=Kind.ENCODER,
        model="AlbertForMaskedLM",
        config="AlbertConfig",
        options=_TEXT | {"embedding_size": 32},
        batch=batches.masked_words,
    ),
    Architecture(
        name="deberta-v2",
        kind=Kind.ENCODER,
        model="DebertaV2ForMaskedLM",
        config="DebertaV2Config",
        options=_TEXT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        batch=batches.masked_words,
    ),
    Architecture(
        name="modernbert",
        kind=Kind.ENCODER,
        model="ModernBertForMaskedLM",
        config="ModernBertConfig",
        options=_TEXT | _MARKS | {"local_attention": 8, "cls_token_id": 1, "sep_token_id": 2},
        batch=batches.masked_words,
    ),
    Architecture(
        name="longformer",
        kind=Kind.ENCODER,
        model="LongformerForMaskedLM",
        config="LongformerConfig",
        options=_TEXT | {"attention_window": [8, 8]},
        batch=batches.masked_words,
    ),
    Architecture(
        name="fnet",
        kind=Kind.ENCODER,
        model="FNetForMaskedLM",
        config="FNetConfig",
        options=_TEXT,
        batch=batches.masked_words,
    ),
    # -- decoders ------------------------------------------------------------------------------
    Architecture(
        name="gpt2",
        kind=Kind.DECODER,
        model="GPT2LMHeadModel",
        config="GPT2Config",
        options=_GPT,
        batch=batches.continuations,
    ),
    Architecture(
        name="llama",
        kind=Kind.DECODER,
        model="LlamaForCausalLM",
        config="LlamaConfig",
        options=_TEXT | _MARKS | {"num_key_value_heads": 2},
        batch=batches.continuations,
    ),
    Architecture(
        name="gpt-neox",
        kind=Kind.DECODER,
        model="GPTNeoXForCausalLM",
        config="GPTNeoXConfig",
        options=_TEXT | _MARKS,
        batch=batches.continuations,
    ),
    Architecture(
        name="bloom",
        kind=Kind.DECODER,
        model="BloomForCausalLM",
        config="BloomConfig",
        options={"vocab_size": batches.VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4}
        | _MARKS,
        batch=batches.continuations,
    ),
    Architecture(
        name="gemma2",
        kind=Kind.DECODER,
        model="Gemma2ForCausalLM",
        config="Gemma2Config",
        options=_TEXT | _MARKS | {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8},
        batch=batches.continuations,
    ),
    # -- mixtures of experts -------------------------------------------------------------------
    Architecture(
        name="mixtral",
        kind=Kind.EXPERTS,
        model="MixtralForCausalLM",
        config="MixtralConfig",
        options=_TEXT
        | _MARKS
        | {"num_key_value_heads": 2, "num_local_experts": 4, "output_router_logits": True},
        batch=batches.continuations,
    ),
    Architecture(
        name="deepseek-v3",
        kind=Kind.EXPERTS,
        model="DeepseekV3ForCausalLM",
        config="DeepseekV3Config",
        options=_TEXT
        | _MARKS
        | {
            "num_key_value_heads": 4,
            "moe_intermediate_size": 32,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 32,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
        },
        batch=batches.continuations,
    ),
    Architecture(
        name="switch-transformers",
        kind=Kind.EXPERTS,
        model="SwitchTransformersForConditionalGeneration",
        config="SwitchTransformersConfig",
        options=_T5
        | {
            "num_experts": 4,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "num_decoder_layers": 2,
            "expert_capacity": 24,
        },
        batch=batches.pairs_of_texts,
    ),
    # -- encoder and decoder -------------------------------------------------------------------
    Architecture(
        name="t5",
        kind=Kind.ENCODER_DECODER,
        model="T5ForConditionalGeneration",
        config="T5Config",
        options=_T5,
        batch=batches.pairs_of_texts,
    ),
    Architecture(
        name="bart",
        kind=Kind.ENCODER_DECODER,
        model="BartForConditionalGeneration",
        config="BartConfig",
        options=_SEQ2SEQ,
        batch=batches.pairs_of_texts,
    ),
    Architecture(
        name="prophetnet",
        kind=Kind.ENCODER_DECODER,
        model="ProphetNetForConditionalGeneration",
        config="ProphetNetConfig",
        options={
            "vocab_size": batches.VOCABULARY,
            "hidden_size": 64,
            "num_encoder_layers": 2,
            "num_decoder_layers": 2,
            "num_encoder_attention_heads": 4,
            "num_decoder_attention_heads": 4,
            "encoder_ffn_dim": 128,
            "decoder_ffn_dim": 128,
            "max_position_embeddings": 64,
            "decoder_start_token_id": 1,
        }
        | _MARKS,
        batch=batches.pairs_of_texts,
    ),
    # -- state spaces and recurrences ----------------------------------------------------------
    Architecture(
        name="mamba",
        kind=Kind.STATE_SPACE,
        model="MambaForCausalLM",
        config="MambaConfig",
        options={
            "vocab_size": batches.VOCABULARY,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "state_size": 8,
        }
        | _MARKS,
        batch=batches.continuations,
    ),
    Architecture(
        name="mamba2",
        kind=Kind.STATE_SPACE,
        model="Mamba2ForCausalLM",
        config="Mamba2Config",
        options={
            "vocab_size": batches.VOCABULARY,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "state_size": 16,
            "num_heads": 8,
            "head_dim": 16,
            "n_groups": 2,
            "chunk_size": 8,
        }
        | _MARKS,
        batch=batches.continuations,
    ),
    Architecture(
        name="rwkv",
        kind=Kind.RECURRENT,
        model="RwkvForCausalLM",
        config="RwkvConfig",
        options={
            "vocab_size": batches.VOCABULARY,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "context_length": 64,
            "use_cache": False,  # outside training the state is written in place
        }
        | _MARKS,
        batch=batches.continuations,
    ),
    Architecture(
        name="recurrent-gemma",
        kind=Kind.RECURRENT,
        model="RecurrentGemmaForCausalLM",
        config="RecurrentGemmaConfig",
        options={
            "vocab_size": batches.VOCABULARY,
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "lru_width": 64,
            "attention_window_size": 16,
        }
        | _MARKS,
        batch=batches.continuations,
    ),
    Architecture(
        name="xlstm",
        kind=Kind.RECURRENT,
        model="xLSTMForCausalLM",
        config="xLSTMConfig",
        options={
            "vocab_size": batches.VOCABULARY,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_heads": 4,
            "qk_dim_factor": 1.0,
            "mode": "train_with_padding",
            "chunk_size": 8,
        }
        | _MARKS,
        batch=batches.continuations,
    ),
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
            "image_size": 32,
            "hidden_sizes": [32, 48, 64],
            "neck_hidden_sizes": [8, 16, 24, 32, 48, 64, 96],
        }
        | _LABELS,
        batch=batches.classified_images,
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
            "text_config": _TEXT | _MARKS | {"eos_token_id": batches.VOCABULARY - 1},
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
        options={k: v for k, v in _SEQ2SEQ.items() if k != "max_position_embeddings"}
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
        options=_TEXT
        | {"pad_token_id": 1, "mask_token_id": 4, "position_embedding_type": "rotary"},
        batch=batches.masked_words,
    ),
    Architecture(
        name="decision-transformer",
        kind=Kind.CONTROL,
        model="DecisionTransformerModel",
        config="DecisionTransformerConfig",
        options={"state_dim": 6, "act_dim": 3, "hidden_size": 64, "n_layer": 2, "n_head": 4}
        | {"max_ep_len": 16}
        | _MARKS,
        batch=batches.trajectories,
        answer="action_preds",
    ),
)

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType({row.name: row for row in _ROWS})
