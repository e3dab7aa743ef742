"""Configuration keys that are knowingly not read: data only, one set per kind of file.

A key stands here when leaving it out cannot change an answer: it speaks about training, about the
library that wrote the file, or repeats what another file says with more authority.
"""

import reprlib
from collections.abc import Mapping


def _keys(names: str) -> frozenset[str]:
    return frozenset(names.split())


# Written by every release of the transformers library. quantization_config is read where the
# weights are.
LIBRARY = _keys("""
    _attn_implementation_autoset _commit_hash _from_model_config _name_or_path _num_labels
    architectures attn_implementation auto_map cross_attention_hidden_size finetuning_task id2label
    is_composition is_decoder is_encoder_decoder label2id model_type problem_type
    quantization_config quantization_config_file return_dict sep_token_id task_specific_params
    tf_legacy_loss tokenizer_class transformers_version use_bfloat16 use_cache use_return_dict
""")

# Sampling defaults that old releases wrote into config.json; the caller's sampling options decide.
SAMPLING = _keys("""
    add_cross_attention bad_words_ids begin_suppress_tokens chunk_size_feed_forward
    decoder_start_token_id diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty
    max_length max_new_tokens min_length no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_attentions output_hidden_states output_scores prefix pruned_heads
    remove_invalid_values repetition_penalty return_dict_in_generate suppress_tokens temperature
    tie_encoder_decoder top_k top_p torchscript typical_p
""")

# About training only.
TRAINING = _keys("""
    attention_dropout attn_pdrop dropout emb_pdrop embedding_fraction init_device
    initializer_factor initializer_range pretraining_tp resid_pdrop use_gradient_checkpointing
""")

COMMON = LIBRARY | SAMPLING | TRAINING

TEXT = COMMON | _keys("layer_types max_window_layers decoder_sparse_step")

# MosaicML's: the kernel and the normalisation type do not change the numbers that are computed.
MPT = TEXT | _keys("""
    attn_cfg fc_type ffn_config init_config learned_pos_emb max_position_embeddings norm_type
    tokenizer_name verbose vocab_parallel
""")
MPT_ATTENTION = LIBRARY | SAMPLING | _keys("attn_impl attn_pdrop attn_uses_sequence_id")

# Read by the original's training code only, or by branches that it never released.
LLAVA = _keys("""
    freeze_mm_mlp_adapter freeze_mm_vision_resampler image_crop_resolution image_split_resolution
    mm_patch_token mm_projector_lr mm_resampler_type mm_vision_tower_lr pretrain_mm_mlp_adapter
    tune_mm_mlp_adapter tune_mm_vision_resampler use_mm_proj vision_use_head
""")

HF_LLAVA = COMMON | _keys("""
    bos_token_id eos_token_id hidden_size ignore_index image_seq_length pad_token_id vocab_size
""")

VISION = COMMON | _keys("""
    bos_token_id dtype eos_token_id logit_scale_init_value pad_token_id projection_dim text_config
    text_config_dict tie_word_embeddings torch_dtype vision_use_head vocab_size
""")

PREPROCESSOR = _keys("""
    _valid_processor_keys aspect_ratio_setting auto_map background_color data_format
    default_to_square device disable_grouping do_convert_rgb feature_extractor_type
    image_grid_pinpoints image_processor_type input_data_format pad_size processor_class
    return_tensors
""")

GENERATION = COMMON | _keys("trust_remote_code")


# Values with which each of these leaves an answer as it is; any other changes even greedy answers.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "bad_words_ids": (None, []),
    "begin_suppress_tokens": (None, []),
    "encoder_repetition_penalty": (None, 1.0),
    "exponential_decay_length_penalty": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "guidance_scale": (None, 1.0),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "no_repeat_ngram_size": (None, 0),
    "num_beams": (None, 1),
    "repetition_penalty": (None, 1.0),
    "sequence_bias": (None, {}, []),
    "suppress_tokens": (None, []),
}


class SamplingNote(str):
    """A note that tokens are chosen otherwise than generation_config.json asks for."""

    __slots__ = ()


def sampling_notes(generation: Mapping[str, object]) -> tuple[SamplingNote, ...]:
    """Return a line for each setting of generation_config.json that transformers would follow.

    What a person asks for decides how lapilli answers, as in the original's own programs. A file
    that asks for something else is told of: with it transformers gives other tokens.
    """
    return tuple(
        SamplingNote(
            f"generation_config.json asks for {key} = {reprlib.repr(value)}, which is not applied: "
            "only what you ask for yourself changes how tokens are chosen"
        )
        for key, value in sorted(generation.items())
        if key in _NEUTRAL and value not in _NEUTRAL[key]
    )
