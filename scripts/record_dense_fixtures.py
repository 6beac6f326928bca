"""Records what the transformers library computes with tiny dense models of every family, for tests/interop.

    python scripts/record_dense_fixtures.py tests/interop/fixtures/dense [CASE ...]

needs torch and transformers 5 (recorded with torch 2.13.0 and transformers 5.24.0 on CPU). One FAMILY-CASE.npz holds

    config            the configuration as the library writes it to config.json, as JSON text
    published/TENSOR  float16, in which every weight is representable: the checkpoint as the library saves it
    tokens            i64[batch, seq]
    logits            f32[batch, seq, vocab]
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file

CLASSES = {
    "llama": "Llama", "smollm3": "SmolLM3", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "olmo2": "Olmo2",
    "gemma2": "Gemma2", "gemma3": "Gemma3", "gpt2": "GPT2",
}  # fmt: skip
COMMON = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "eos_token_id": None, "bos_token_id": None,
    "pad_token_id": None,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES = {
    "llama-bias": {"attention_bias": True, "head_dim": 6, "tie_word_embeddings": True, "pad_token_id": 3},
    "llama-linear": {"rope_scaling": {"type": "linear", "factor": 2.5}, "rope_theta": 300.0},
    "llama-dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 8},
    "llama-yarn": {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, "head_dim": 12,
    },
    "llama-yarn_mscale": {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 8,
                         "beta_slow": 2, "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False}, "head_dim": 12,
    },
    "llama-llama3": {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 32}, "head_dim": 12},
    "smollm3-nope": {"num_hidden_layers": 5, "pad_token_id": 3},
    "smollm3-window": {
        "num_hidden_layers": 3, "no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 5,
    },
    "mistral-window": {"sliding_window": 6, "head_dim": 6},
    "qwen2-tied": {"tie_word_embeddings": True},
    "qwen2-window": {
        "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1,
    },
    "qwen3-norms": {"head_dim": 6, "num_hidden_layers": 3, "rms_norm_eps": 0.01},
    "olmo2-norms": {"num_hidden_layers": 3, "rms_norm_eps": 0.01},
    "gemma2-caps": {
        "num_hidden_layers": 3, "head_dim": 6, "sliding_window": 5, "query_pre_attn_scalar": 9, "pad_token_id": 0,
        "attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5, "attn_implementation": "eager",
    },
    "gemma3-windows": {
        "num_hidden_layers": 4, "head_dim": 6, "sliding_window": 5, "query_pre_attn_scalar": 9,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        "pad_token_id": 0,
    },
    "gpt2-untied": {
        "n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 32, "n_inner": 20, "tie_word_embeddings": False,
    },
}  # fmt: skip
BATCH, SEQ = 2, 24


def main(folder: Path, *only: str) -> None:
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    for name, changes in CASES.items():
        if only and name not in only:
            continue
        np.savez_compressed(folder / f"{name}.npz", **record(name, changes))
        print(f"{name}: {(folder / f'{name}.npz').stat().st_size} bytes")


def record(name: str, changes: dict) -> dict[str, np.ndarray]:
    """What the file of one case holds."""
    family = CLASSES[name.split("-")[0]]
    kinds = ("TextConfig", "ForCausalLM") if family == "Gemma3" else ("Config", "ForCausalLM")
    kinds = ("Config", "LMHeadModel") if family == "GPT2" else kinds
    make_config, make_model = (getattr(transformers, family + kind) for kind in kinds)
    common = {"vocab_size": 40, "bos_token_id": None, "eos_token_id": None} if family == "GPT2" else COMMON
    model = make_model(make_config(**(common | changes))).eval()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(weight(rng, key, tuple(parameter.shape), family)))
        tokens = rng.integers(0, model.config.vocab_size, (BATCH, SEQ))
        logits = model(torch.from_numpy(tokens)).logits.numpy()
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)
        published = load_file(f"{saved}/model.safetensors")
        text = json.dumps(json.loads(Path(saved, "config.json").read_text(encoding="utf-8")))
    held = {f"published/{key}": value.numpy().astype(np.float16) for key, value in published.items()}
    return {"config": np.array(text), "tokens": tokens, "logits": logits} | held


def weight(rng: np.random.Generator, name: str, shape: tuple[int, ...], family: str) -> np.ndarray:
    """Random values that keep activations of order one."""
    if name.endswith("bias"):
        value = 0.3 * rng.standard_normal(shape)
    elif "norm" in name or "ln_" in name:
        value = (not family.startswith("Gemma")) + 0.3 * rng.standard_normal(shape)
    else:
        value = (
            1.2 * rng.standard_normal(shape) / np.sqrt(shape[0] if family == "GPT2" and len(shape) > 1 else shape[-1])
        )
    return value.astype(np.float16).astype(np.float32)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
