"""Tiny random checkpoints of many families, made in a directory of the test.

Every dimension is another number, so that a transposed axis cannot pass, and one-dimensional weights (norms, biases)
are random too, so that a forgotten one cannot.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import AutoConfig, AutoModelForCausalLM

BLOCKS = 5
VOCAB = 97
HIDDEN = 48

_SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 56,
    "vocab_size": VOCAB,
    "max_position_embeddings": 120,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GPT2 = {"n_embd": HIDDEN, "n_layer": BLOCKS, "n_head": 6, "n_inner": 56, "vocab_size": VOCAB, "n_positions": 120}
_EXPERTS = {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "decoder_sparse_step": 1}
_SLIDING = {"sliding_window": 9}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**_SIZES, "head_dim": 10, "attention_bias": True},
    "llama-tied": {**_SIZES, "model_type": "llama", "tie_word_embeddings": True},
    "llama-dynamic": {
        **_SIZES,
        "model_type": "llama",
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    },
    "llama3-rope": {
        **_SIZES,
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 30,
        },
    },
    "mistral": {**_SIZES, **_SLIDING, "head_dim": 10},
    "qwen2": {**_SIZES, **_SLIDING, "use_sliding_window": True, "max_window_layers": 2},
    "qwen3": {**_SIZES, "head_dim": 10},
    "gemma": {**_SIZES, "head_dim": 10},
    "gemma2": {
        **_SIZES,
        **_SLIDING,
        "head_dim": 10,
        "query_pre_attn_scalar": 13,
        "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {
        **_SIZES,
        **_SLIDING,
        "head_dim": 10,
        "query_pre_attn_scalar": 13,
        "layer_types": [f"{kind}_attention" for kind in ("sliding", "sliding", "full", "sliding", "full")],
    },
    "phi": {**_SIZES, "partial_rotary_factor": 0.5},
    "phi3": {**_SIZES, **_SLIDING},
    "gpt2": {"model_type": "gpt2", **_GPT2},
    "gpt_neox": {**_SIZES, "rotary_pct": 0.5, "attention_bias": True},
    "opt": {**_SIZES, "ffn_dim": 56, "word_embed_proj_dim": 22},
    "bloom": {"hidden_size": HIDDEN, "n_layer": BLOCKS, "n_head": 6, "vocab_size": VOCAB},
    "falcon-alibi": {
        "model_type": "falcon",
        "hidden_size": HIDDEN,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 6,
        "vocab_size": VOCAB,
        "alibi": True,
        "multi_query": True,
        "parallel_attn": False,
        "bias": True,
    },
    "falcon-rotary": {
        "model_type": "falcon",
        "hidden_size": HIDDEN,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 6,
        "vocab_size": VOCAB,
        "max_position_embeddings": 120,
    },
    "falcon-new": {
        "model_type": "falcon",
        "hidden_size": HIDDEN,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 6,
        "num_kv_heads": 2,
        "vocab_size": VOCAB,
        "new_decoder_architecture": True,
        "max_position_embeddings": 120,
    },
    "mixtral": {**_SIZES, "num_local_experts": 7, "num_experts_per_tok": 3},
    "qwen3_moe": {**_SIZES, **_EXPERTS, "head_dim": 10, "mlp_only_layers": [1]},
    "olmo2": _SIZES,
    "smollm3": {**_SIZES, "no_rope_layer_interval": 3},
    "granite": {
        **_SIZES,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.5,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.3,
    },
    "cohere": {**_SIZES, "logit_scale": 0.3},
    "cohere2": {**_SIZES, **_SLIDING, "logit_scale": 0.3},
    "stablelm": {**_SIZES, "partial_rotary_factor": 0.5},
    "starcoder2": {**_SIZES, **_SLIDING},
    "gpt_oss": {**_SIZES, **_SLIDING, "head_dim": 10, "num_local_experts": 7, "num_experts_per_tok": 3},
    "deepseek_v3": {
        **_SIZES,
        "num_key_value_heads": 6,
        "q_lora_rank": 14,
        "kv_lora_rank": 18,
        "qk_rope_head_dim": 6,
        "qk_nope_head_dim": 11,
        "v_head_dim": 9,
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 2,
    },
    "llama4_text": {
        **_SIZES,
        "head_dim": 10,
        "attention_chunk_size": 9,
        "num_local_experts": 3,
        "intermediate_size_mlp": 44,
        "no_rope_layers": [1, 1, 0, 1, 0],
        "moe_layers": [1, 3],
    },
    "gpt_bigcode": {"model_type": "gpt_bigcode", **_GPT2},
    "gpt_neo": {
        "hidden_size": HIDDEN,
        "num_layers": BLOCKS,
        "num_heads": 6,
        "vocab_size": VOCAB,
        "max_position_embeddings": 120,
        "attention_types": [[["global", "local"], 2], [["global"], 1]],
        "window_size": 9,
    },
    "gptj": {**_GPT2, "rotary_dim": 4},
    "mpt": {"d_model": HIDDEN, "n_heads": 6, "n_layers": BLOCKS, "vocab_size": VOCAB, "max_seq_len": 120},
    "biogpt": _SIZES,
    "exaone4": {**_SIZES, **_SLIDING, "sliding_window_pattern": 3, "head_dim": 8},
    "glm4": {**_SIZES, "head_dim": 10, "partial_rotary_factor": 0.5},
}
"""By a name of ours; the family is `model_type` where it is given, else the name."""


def make_checkpoint(folder: Path, family: str, *, shard_size: str = "5GB", seed: int = 0, **overrides: Any) -> Path:
    """Write a random model of `family` to `folder`, as safetensors; returns the folder."""
    model = make_model(family, seed=seed, **overrides)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, max_shard_size=shard_size)
    return folder


def make_model(family: str, *, seed: int = 0, **overrides: Any) -> Any:
    """A random causal language model of `family` in float32."""
    settings = {"model_type": family, **FAMILIES.get(family, {}), **overrides}
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.dim() == 1:
                    weight += 0.1 * torch.randn_like(weight)
                elif "embed" not in name and "wte" not in name:
                    weight *= 4.0  # the usual initialisation is so small that blocks hardly change anything
    model.generation_config.pad_token_id = 0
    return model


def write_gguf(path: Path, model: Any, *, extra: dict[str, torch.Tensor] | None = None) -> Path:
    """Write a llama or qwen3_moe model and a small vocabulary as GGUF, in the form that llama.cpp gives them."""
    config = model.config
    arch = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE}[config.model_type]
    writer = gguf.GGUFWriter(str(path), gguf.MODEL_ARCH_NAMES[arch])
    if arch == gguf.MODEL_ARCH.QWEN3MOE:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    letters = [chr(ord("A") + index) for index in range(26)]
    writer.add_token_list([*"?<>", "a", "b", "ab", *letters, *(f"{n:04}" for n in range(config.vocab_size - 32))])
    writer.add_token_types([1] * config.vocab_size)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(2)
    for name, weight in _gguf_tensors(model, gguf.get_tensor_name_map(arch, config.num_hidden_layers)):
        writer.add_tensor(name, weight.contiguous().numpy())
    for name, weight in (extra or {}).items():
        writer.add_tensor(name, weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _gguf_tensors(model: Any, names: gguf.TensorNameMap) -> Iterator[tuple[str, torch.Tensor]]:
    """Of a llama model, queries and keys have their rows in another order; experts have gates and ups apart."""
    config = model.config
    heads = {"q_proj.weight": config.num_attention_heads, "k_proj.weight": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        stem, _, suffix = name.rpartition(".")
        if suffix == "gate_up_proj":
            for part, half in zip(("gate", "up"), weight.chunk(2, dim=1), strict=True):
                yield f"{names.get_name(f'{stem}.{part}_proj')}.weight", half
        elif suffix == "down_proj":
            yield f"{names.get_name(name)}.weight", weight
        elif config.model_type == "llama" and name.endswith(tuple(heads)):
            count = next(count for projection, count in heads.items() if name.endswith(projection))
            yield (
                f"{names.get_name(stem)}.weight",
                weight.view(count, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape),
            )
        elif name != "lm_head.weight" or not config.tie_word_embeddings:
            yield f"{names.get_name(stem)}.{suffix}", weight
