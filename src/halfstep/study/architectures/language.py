"""Rows of language models: encoders, decoders, mixtures of experts, state spaces, recurrences."""

from __future__ import annotations

from halfstep.study.architectures import batches
from halfstep.study.architectures.architecture import Architecture, Kind

__all__ = ["LANGUAGE", "MARKS", "SEQ2SEQ", "TEXT"]

TEXT = {
    "vocab_size": batches.VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
}
MARKS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GPT = {"vocab_size": batches.VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4} | MARKS
SEQ2SEQ = {
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
} | MARKS
_T5 = {
    "vocab_size": batches.VOCABULARY,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
LANGUAGE = (
    # -- encoders ------------------------------------------------------------------------------
    Architecture(
        name="bert",
        kind=Kind.ENCODER,
        model="BertForMaskedLM",
        config="BertConfig",
        options=TEXT,
        batch=batches.masked_words,
    ),
    Architecture(
        name="albert",
        kind=Kind.ENCODER,
        model="AlbertForMaskedLM",
        config="AlbertConfig",
        options=TEXT | {"embedding_size": 32},
        batch=batches.masked_words,
    ),
    Architecture(
        name="deberta-v2",
        kind=Kind.ENCODER,
        model="DebertaV2ForMaskedLM",
        config="DebertaV2Config",
        options=TEXT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        batch=batches.masked_words,
    ),
    Architecture(
        name="modernbert",
        kind=Kind.ENCODER,
        model="ModernBertForMaskedLM",
        config="ModernBertConfig",
        options=TEXT | MARKS | {"local_attention": 8, "cls_token_id": 1, "sep_token_id": 2},
        batch=batches.masked_words,
    ),
    Architecture(
        name="longformer",
        kind=Kind.ENCODER,
        model="LongformerForMaskedLM",
        config="LongformerConfig",
        options=TEXT | {"attention_window": [8, 8]},
        batch=batches.masked_words,
    ),
    Architecture(
        name="fnet",
        kind=Kind.ENCODER,
        model="FNetForMaskedLM",
        config="FNetConfig",
        options=TEXT,
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
        options=TEXT | MARKS | {"num_key_value_heads": 2},
        batch=batches.continuations,
    ),
    Architecture(
        name="gpt-neox",
        kind=Kind.DECODER,
        model="GPTNeoXForCausalLM",
        config="GPTNeoXConfig",
        options=TEXT | MARKS,
        batch=batches.continuations,
    ),
    Architecture(
        name="bloom",
        kind=Kind.DECODER,
        model="BloomForCausalLM",
        config="BloomConfig",
        options={"vocab_size": batches.VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4}
        | MARKS,
        batch=batches.continuations,
    ),
    Architecture(
        name="gemma2",
        kind=Kind.DECODER,
        model="Gemma2ForCausalLM",
        config="Gemma2Config",
        options=TEXT | MARKS | {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8},
        batch=batches.continuations,
    ),
    # -- mixtures of experts -------------------------------------------------------------------
    Architecture(
        name="mixtral",
        kind=Kind.EXPERTS,
        model="MixtralForCausalLM",
        config="MixtralConfig",
        options=TEXT
        | MARKS
        | {"num_key_value_heads": 2, "num_local_experts": 4, "output_router_logits": True},
        batch=batches.continuations,
    ),
    Architecture(
        name="deepseek-v3",
        kind=Kind.EXPERTS,
        model="DeepseekV3ForCausalLM",
        config="DeepseekV3Config",
        options=TEXT
        | MARKS
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
        options=SEQ2SEQ,
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
        | MARKS,
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
        | MARKS,
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
        | MARKS,
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
            "use_cache": False,  # outside training the state is written in place,
            "rescale_every": 0,  # and so would the weights be, which a switched model refuses
        }
        | MARKS,
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
        | MARKS,
        batch=batches.continuations,
    ),
)
