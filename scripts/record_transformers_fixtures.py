"""Records what the transformers library computes with tiny mixture-of-experts models, for tests/interop.

    python scripts/record_transformers_fixtures.py tests/interop/fixtures

needs torch and transformers 5, which nothing else here does (recorded with torch 2.13.0 and transformers 5.23.0 on
CPU). One NAME.npz per case holds

    config               the configuration as the library writes it to config.json, as JSON text
    published/TENSOR     float16: the checkpoint as the library saves it, a matrix per expert
    fused/TENSOR         float16: the same as the library names it in memory; of the cases with gradients
    tokens, mask         i64[batch, seq]; attention mask, 0 is padding
    logits               f32[batch, seq, vocab]
    aux_loss, loss       f32[]: load_balancing_loss_func; next token's cross entropy + router_aux_loss_coef * aux_loss
    gradients/TENSOR     f32: of `loss`, under the names in memory

Weights are representable in float16, and large enough that no choice of experts is decided by rounding.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

KINDS = {
    "mixtral": (MixtralConfig, MixtralForCausalLM),
    "olmoe": (OlmoeConfig, OlmoeForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
}
COMMON = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "eos_token_id": None, "bos_token_id": None,
    "output_router_logits": True,
}  # fmt: skip
CASES = {
    "mixtral": {"num_local_experts": 4},
    "mixtral-window": {
        "num_local_experts": 5, "num_experts_per_tok": 3, "head_dim": 6, "sliding_window": 4, "num_hidden_layers": 3,
        "tie_word_embeddings": True, "rms_norm_eps": 0.01, "pad_token_id": 3, "router_aux_loss_coef": 0.5,
    },
    "mixtral-padded": {"num_local_experts": 3, "num_experts_per_tok": 1, "num_key_value_heads": 4},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 3, "num_key_value_heads": None, "router_aux_loss_coef": 1.0},
    "olmoe-clip": {
        "num_experts": 6, "num_experts_per_tok": 2, "clip_qkv": 0.7, "norm_topk_prob": True, "attention_bias": True,
        "tie_word_embeddings": True, "pad_token_id": None,
    },
    "qwen3_moe": {
        "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 4, "norm_topk_prob": True, "head_dim": 8,
        "sliding_window": 2, "router_aux_loss_coef": 0.3,
    },
    "qwen3_moe-dense": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "num_hidden_layers": 6, "head_dim": 4,
        "decoder_sparse_step": 2, "mlp_only_layers": [3], "pad_token_id": 5, "router_aux_loss_coef": 0.2,
    },
    "qwen3_moe-window": {
        "num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 8, "head_dim": 10, "attention_bias": True,
        "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "norm_topk_prob": True,
    },
}  # fmt: skip
GRADIENTS = {"mixtral", "mixtral-window", "olmoe", "qwen3_moe", "qwen3_moe-dense"}
BATCH, SEQ, MARGIN = 2, 11, 1e-3


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for name, changes in CASES.items():
        for seed in range(100):
            recorded = record(name, changes, seed)
            if recorded is not None:
                break
        else:
            raise SystemExit(f"{name}: every seed leaves a choice of experts to rounding")
        np.savez_compressed(folder / f"{name}.npz", **recorded)
        print(f"{name}: seed {seed}, {(folder / f'{name}.npz').stat().st_size} bytes")


def record(name: str, changes: dict, seed: int) -> dict[str, np.ndarray] | None:
    """What the file of one case holds; None where a choice of experts is too close."""
    make_config, make_model = KINDS[name.split("-")[0]]
    config = make_config(**(COMMON | changes))
    model = make_model(config).eval()
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(weight(rng, key, tuple(parameter.shape))))
    tokens = rng.integers(0, config.vocab_size, (BATCH, SEQ))
    tokens[:, 4] = config.pad_token_id or 0
    mask = np.ones((BATCH, SEQ), np.int64)
    if name.endswith("padded"):
        mask[1, 7:] = 0
    ids, labels = torch.from_numpy(tokens), torch.from_numpy(np.where(mask, tokens, -100))
    out = model(ids, attention_mask=torch.from_numpy(mask), labels=labels, output_router_logits=True)
    chosen = config.num_experts_per_tok
    for logits in out.router_logits:
        ranked = torch.softmax(logits, -1).sort(-1, descending=True).values
        if chosen < ranked.shape[-1] and (ranked[:, chosen - 1] - ranked[:, chosen]).min() < MARGIN:
            return None
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)
        published = load_file(f"{saved}/model.safetensors")
        text = json.dumps(json.loads(Path(saved, "config.json").read_text(encoding="utf-8")))
    held = {
        "config": np.array(text), "tokens": tokens, "mask": mask, "logits": out.logits.detach().numpy(),
        "aux_loss": out.aux_loss.detach().numpy(), "loss": out.loss.detach().numpy(),
    }  # fmt: skip
    held |= {f"published/{key}": value.numpy().astype(np.float16) for key, value in published.items()}
    if name in GRADIENTS:
        out.loss.backward()
        for key, parameter in model.named_parameters():
            held[f"fused/{key}"] = parameter.detach().numpy().astype(np.float16)
            held[f"gradients/{key}"] = parameter.grad.numpy()
    return held


def weight(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random values that keep activations of order one and routers decided; a padding token's row is random too."""
    if "norm" in name:
        value = 1 + 0.3 * rng.standard_normal(shape)
    elif name.endswith("bias"):
        value = 0.3 * rng.standard_normal(shape)
    else:
        scale = 1.0 if "embed_tokens" in name else 1.5 if name.endswith("gate.weight") else 1.2
        value = scale * rng.standard_normal(shape) / np.sqrt(shape[-1])
    return value.astype(np.float16).astype(np.float32)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
