"""Configurations small enough to test: the same architecture with a width of 32, two layers, four heads.

A config class is shrunk by the names of its fields, never by the name of the model: what a field means (a width, a
number of layers, a probability of dropping something) is told by its name. `OVERRIDES` lists the few classes
whose fields constrain each other in ways that names do not tell.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

WIDTH, HEADS, LAYERS, VOCABULARY, POSITIONS, IMAGE, PATCH = 32, 4, 2, 48, 64, 32, 8

# The first pattern that matches a field's whole name decides. A number stands for itself; None leaves the default.
_RULES: list[tuple[str, Any]] = [
    (r".*drop.*|.*_pdrop|.*layerdrop|.*jitter.*|mask_(time|feature)_prob", 0.0),
    # tokens
    (r"pad_(token_id|index)", 0),
    (r"(bos|decoder_start|forced_bos)_(token_id|index)|bos_index", 1),
    (r"(eos|forced_eos|sep|eod)_(token_id|index)|eos_index", 2),
    (r"image_(token_id|token_index)", 40),
    (r"audio_(token_id|token_index)", 41),
    (r"video_token_id", 42),
    (r"(boi|boa|eoi|eoa|mask|cls|unk|vision_(start|end)|audio_[be]os|timestamp|document)_(token_)?(id|index)", 3),
    (r"(subs|tag)_pad_id", 3),
    # counts
    (r"mamba_n(um)?_heads|n_mamba_heads", 8),
    (r"num_(hidden_)?layers|n_layers?|num_blocks|(num_)?(en|de)coder_layers|.*encoder_layers|t2u_.*_layers", LAYERS),
    (r"depths|depth|num_block_repeats|layer_depths|stage_num(b_of_layers|_blocks)|stage_numb_of_layers", 1),
    (r"first_k_dense_replace|num_dense_layers|max_window_layers|n_layers_per_attn_res_block|moe_layer_start_index", 1),
    (r"num_sparse_.*_layers|num_mtp_layers|num_nextn_predict_layers|num_self_attends_per_block", 1),
    (r".*sparse_step|expert_layer_period", 1),
    (r"expert_layer_offset|num_kv_shared_layers", 0),
    (r"attn_layer_period|layer_group_size|global_attn_every_n_layers|sliding_window_pattern|no_rope_layer_interval", 2),
    (r"attn_layer_offset", 1),
    (r"linear_num_key_heads", 2),
    (r".*attention_heads|num_heads|n_heads?|.*_n_heads|linear_num_(value_)?heads", HEADS),
    (r"num_(local_|routed_)?experts|n_routed_experts|moe_num_experts", 4),
    (r"num_experts_per_(tok|token)|moe_top_?k|moe_k|top_k_experts", 2),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r"n_group|topk_group|zero_expert_num", 1),
    (r"expert_capacity", 64),
    # widths
    (r"(neck_)?hidden_sizes|embed_dims?|(in|out)_channels|stage_.*_channels|base_attn_unit_dims", "widths"),
    (r".*hidden_size|d_model|n_embd|embedding_size|(emb_)?dim|word_embed_proj_dim|d_embed|lru_width|d_latents", WIDTH),
    (r".*intermediate_size.*|.*ffn_dim|d_ff|dff|dim_ff|d_inner|hidden_dim|n_inner|.*ffn_hidden_size|feed_forward_size|mamba_d_ssm",
     2 * WIDTH),
    (r".*head_dim|d_kv|d_head|kv_channels|attention_head_size|dim_head|mamba_d_head|v_head_dim", 8),
    (r"(q|kv|o)_lora_rank|.*_rank", 8),
    (r".*state_size|mamba_d_state", 8),
    (r".*_embed_dim|.*_emb_size|d_rel|.*_projection_dim|projection_dim|proj_size|classifier_proj_size", 16),
    (r"num_mel_bins", 8),
    (r"index_topk", 4),
    (r"stem_hidden_channels|stem_out_channels", 8),
    # lengths
    (r"max_source_positions|max_target_positions", 32),
    (r".*position_embeddings|n_positions|n_ctx|context_length|max_seq_len", POSITIONS),
    (r".*sliding_window(_size)?|attention_window_size|local_attention", 4),
    (r".*chunk_size|.*attention_window|local_attn_chunk_length|lsh_attn_chunk_length", 4),
    (r"image_size|input_size", IMAGE),
    (r"patch_size", PATCH),
    (r"rotary_dim", 4),
    (r".*n_groups", 2),
]
_COMPILED = [(re.compile(pattern), value) for pattern, value in _RULES]
_LEAVE = {"chunk_size_feed_forward", "chunk_size_lm_head", "num_labels", "num_channels", "id2label", "label2id"}
_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")

OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "bit": {"num_groups": 4, "embedding_size": 8},
    "blt": {"use_cache": False},
    "convnext": {"patch_size": 4},
    "convnextv2": {"patch_size": 4},
    "donut-swin": {"patch_size": 4, "window_size": 4, "depths": (1, 1), "num_heads": (2, 4), "embed_dim": 16},
    "efficientnet": {"width_coefficient": 0.2, "depth_coefficient": 0.3, "hidden_dim": 256},
    "hgnet_v2": {"stem_channels": [3, 8, 8], "stage_in_channels": [8, 16, 16, 32], "embedding_size": 8,
                 "stage_out_channels": [16, 16, 32, 32]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hiera": {"image_size": (64, 64), "embed_dim": 16},
    "layoutlmv3": {"coordinate_size": 4, "shape_size": 8, "hidden_size": 32},
    "levit": {"image_size": 128, "patch_size": 16},
    "mobilevitv2": {"image_size": 64},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lilt": {"hidden_size": 48},
    "longcat_flash": {"qk_head_dim": 16},
    "mamba2": {"head_dim": 16, "num_heads": 4},
    "neomme": {"head_dim": 16},
    "nystromformer": {"conv_kernel_size": 5},
    "perceiver": {"num_cross_attention_heads": 1, "num_self_attention_heads": 4, "max_position_embeddings": 8},
    "pvt_v2": {"image_size": 64},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds": False, "is_decoder": True, "num_buckets": 4},
    "reformer:classification": {"is_decoder": False},
    "reformer:masked": {"is_decoder": False},
    "swin": {"patch_size": 4, "window_size": 4, "depths": (1, 1), "num_heads": (2, 4), "embed_dim": 16},
    "swinv2": {"patch_size": 4, "window_size": 4, "depths": (1, 1), "num_heads": (2, 4), "embed_dim": 16,
               "pretrained_window_sizes": (0, 0)},
    "xlstm": {"num_heads": 4, "chunk_size": 4},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
              "attention_hidden_size": 64, "attention_head_dim": 16},
    "zaya": {"num_experts_per_tok": 1},
}


def config_class(model_type: str) -> type:
    """The configuration class of a model type, as `AutoConfig` knows it."""
    return CONFIG_MAPPING[model_type]


def small_config(cls: type, overrides: dict[str, Any] | None = None) -> Any:
    """An instance of the config class with every size shrunk; `overrides` win over the rules."""
    defaults = _defaults(cls)
    values = {name: small_value(name, default) for name, default in defaults.items() if name not in _LEAVE}
    values = {k: v for k, v in values.items() if v is not None}
    values.update(_key_value_heads(defaults))
    values.update(_by_layer(defaults, values))
    for name, sub in (getattr(cls, "sub_configs", None) or {}).items():
        small = _small_sub(defaults.get(name), sub)
        if small is not None:
            values[name] = small
    values.update(OVERRIDES.get(getattr(cls, "model_type", ""), {}))
    values.update(overrides or {})
    return cls(**values)


def _defaults(cls: type) -> dict[str, Any]:
    """The fields' values in the default configuration, derived ones included."""
    fields = [f for f in dataclasses.fields(cls) if f.init]
    try:
        built = cls()
        return {f.name: getattr(built, f.name, None) for f in fields}
    except Exception:
        return {f.name: None if f.default is dataclasses.MISSING else f.default for f in fields}


def small_value(name: str, default: Any) -> Any:
    """What a field of this name should be, or None to leave it."""
    if isinstance(default, (bool, str, dict)) or dataclasses.is_dataclass(default):
        return None
    if re.fullmatch(r".*vocab(ulary)?_?(size)?(_.*)?", name):
        return VOCABULARY if (isinstance(default, int) and default > VOCABULARY) or name == "vocab_size" else None
    for pattern, value in _COMPILED:
        if pattern.fullmatch(name):
            if name == "patch_size" and isinstance(default, int):
                return min(default, PATCH)
            if default is None and name.endswith(("head_dim", "experts", "vocab_size")):
                return value
            return _like(default, value)
    if isinstance(default, int) and default > 64 and not name.endswith(("_id", "_index")):
        return 16
    if name.endswith(("_token_id", "_token_index")) and isinstance(default, int) and default >= VOCABULARY:
        return 4
    return None


def _like(default: Any, value: Any) -> Any:
    """`value` in the shape of the default: lists keep their length, and growing widths keep growing."""
    if default is None:
        return value if value in (0, 1, 2, 3) and isinstance(value, int) else None
    if isinstance(default, (list, tuple)):
        if not default or not all(isinstance(d, (int, float)) for d in default):
            return None
        if value == "widths" or (isinstance(value, int) and max(default) > 16):
            smallest = min(d for d in default if d > 3)
            return type(default)(8 * max(1, round(d / smallest)) if d > 3 else d for d in default)
        return type(default)(type(d)(value) for d in default) if value in (0.0, 1) else None
    if value == "widths":
        value = WIDTH
    return int(value) if isinstance(default, int) and not isinstance(default, bool) and value == int(value) else value


def _key_value_heads(defaults: dict[str, Any]) -> dict[str, Any]:
    """Grouped heads stay grouped; one per query head stays so."""
    counts = (defaults.get(n) for n in ("num_attention_heads", "n_heads", "num_heads"))
    heads = next((n for n in counts if isinstance(n, int)), None)
    found = {}
    for name in ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "indexer_kv_heads", "swa_num_key_value_heads"):
        if name in defaults and isinstance(defaults[name], (int, type(None))):
            found[name] = HEADS if defaults[name] in (heads, None) else 1 if defaults[name] == 1 else 2
    return found


def _by_layer(defaults: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Lists with one entry per layer, cut to the new number of layers with every kind of layer kept."""
    name = next((n for n in _LAYER_COUNTS if isinstance(defaults.get(n), int)), None)
    if name is None:
        return {}
    lists = {k: v for k, v in defaults.items() if isinstance(v, (list, tuple)) and len(v) == defaults[name]}
    kinds = list(dict.fromkeys(zip(*lists.values(), strict=True))) if lists else []
    if not kinds or len(kinds) > 8 or any(isinstance(v, (list, tuple)) for kind in kinds for v in kind):
        return {}
    chosen = (kinds * LAYERS)[: max(LAYERS, len(kinds))]
    found: dict[str, Any] = {
        k: type(v)(2 * WIDTH if isinstance(kind[i], int) and kind[i] > 64 else kind[i] for kind in chosen)
        for i, (k, v) in enumerate(lists.items())
    }
    return {**found, name: len(chosen)}


def _small_sub(default: Any, sub: type) -> Any:
    """A shrunken sub-configuration, of the class that the default configuration has there."""
    if default is None:
        return None
    kind = type(default) if dataclasses.is_dataclass(default) else sub
    return small_config(kind) if dataclasses.is_dataclass(kind) and kind.__name__ != "AutoConfig" else None
