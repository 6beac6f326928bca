"""The Mixture-of-Recursions forward pass of the released code, stated a second time: slow, plain and unrolled.

One sequence at a time, every position through every layer, unselected positions only masked out; nothing is gathered,
stacked or scanned, and nothing is imported from `adaptive`. What a fast implementation computes on compacted sequences
must come out of this one too (MoR paper, sections 2 and 3; released code, expert_choice_router.py,
token_choice_router.py, cache_utils.py). Tensors and configuration are those of the released code: linear weights
[out, in], each shared tensor once under its first name. All float32, differentiable with respect to the tensors.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
           "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
NORMS = ("input_layernorm", "post_attention_layernorm")


# Structure: which layers exist and where their tensors are.


def is_mor(config: dict) -> bool:
    return bool(config["mor"]["enable"])


def steps(config: dict) -> int:
    """Number of recursions; 1 for a vanilla model, also where that shares keys and values."""
    return config["recursive"]["num_recursion"] if config["recursive"]["enable"] else 1


def _ends(sharing: str) -> int:
    return 2 if sharing.startswith("middle") else 0


def unrolled_layers(config: dict) -> int:
    """Layers of the unrolled network: the released code drops those that do not divide, and numbers the rest anew."""
    layers, rec = config["llama"]["num_hidden_layers"], config["recursive"]
    if not rec["enable"]:
        return layers
    if rec["num_recursion"] == 1:
        return rec["base_depth"]
    ends = _ends(rec["sharing"])
    return (layers - ends) // rec["num_recursion"] * rec["num_recursion"] + ends


def first_use(layer: int, layers: int, sharing: str, recursions: int) -> int:
    """The earliest unrolled layer that has the same parameters (or the same keys and values) as `layer`."""
    ends = _ends(sharing)
    if ends and layer in (0, layers - 1):
        return layer
    offset = ends // 2
    if sharing.endswith("cycle"):
        return offset + (layer - offset) % ((layers - ends) // recursions)
    return offset + (layer - offset) // recursions * recursions


def plain_layers(config: dict) -> list[tuple[str, int]]:
    """(tensor prefix, layer whose keys and values it attends to) of every layer of a vanilla or recursive model."""
    rec, kv, layers = config["recursive"], config["kv_sharing"], unrolled_layers(config)
    shared_by = rec if rec["enable"] else kv  # the released configuration check copies the one into the other
    result = []
    repeats = rec["enable"] and rec["num_recursion"] > 1
    for layer in range(layers):
        source = own = layer
        if repeats or kv["enable"]:
            source = first_use(layer, layers, shared_by["sharing"], shared_by["num_recursion"])
            own = source if repeats else layer
        result.append((f"model.layers.{own}", source if kv["enable"] else layer))
    return result


def mor_layers(config: dict) -> tuple[list[str], list[str], list[str]]:
    """Prefixes of the layers before, inside and after the recursion."""
    ends, count = _ends(config["recursive"]["sharing"]), steps(config)
    block = (unrolled_layers(config) - ends) // count
    expert = config["mor"]["type"] == "expert"
    inside = [f"model.layers.{ends // 2}.{'block' if expert else 'block_list.0'}.{j}" for j in range(block)]
    last = ends // 2 + (count if expert else 1)
    return (["model.layers.0"], inside, [f"model.layers.{last}"]) if ends else ([], inside, [])


def router_prefixes(config: dict) -> list[str]:
    """One prefix per step under expert choice, a single one under token choice."""
    first = _ends(config["recursive"]["sharing"]) // 2
    count = steps(config) if config["mor"]["type"] == "expert" else 1
    return [f"model.layers.{first + r}" for r in range(count)]


def tensor_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every distinct tensor of the model that `config` describes."""
    c, mor = config["llama"], config["mor"]
    d, f, hd = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    q, kv = c["num_attention_heads"] * hd, c["num_key_value_heads"] * hd
    of = dict(zip(LINEARS, [(q, d), (kv, d), (kv, d), (d, q), (f, d), (f, d), (d, f)], strict=True))
    shapes = {"model.embed_tokens.weight": (c["vocab_size"], d), "model.norm.weight": (d,)}
    if not c["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (c["vocab_size"], d)
    prefixes = [p for group in mor_layers(config) for p in group] if is_mor(config) else [
        p for p, _ in plain_layers(config)]  # fmt: skip
    for prefix in prefixes:
        shapes |= {f"{prefix}.{name}.weight": shape for name, shape in of.items()}
        shapes |= {f"{prefix}.{name}.weight": (d,) for name in NORMS}
    if is_mor(config):
        expert = mor["type"] == "expert"
        out = 1 if expert else steps(config)
        routers = [] if mor["rand_router"] else ["mor_router"]
        if expert and mor["expert"]["sampling"] == "aux_router":
            routers.append("mlp_router")
        for prefix in router_prefixes(config):
            for router in routers:
                if mor["router_type"] == "linear":
                    shapes[f"{prefix}.{router}.router.weight"] = (out, d)
                else:  # the released wide_mlp is as wide as mlp
                    shapes[f"{prefix}.{router}.router.0.weight"] = (2 * d, d)
                    shapes[f"{prefix}.{router}.router.2.weight"] = (out, 2 * d)
            if not expert and mor["token"]["balancing"] == "loss_free":
                shapes[f"{prefix}.router_bias"] = (out,)
    return shapes


def random_tensors(config: dict, seed: int) -> dict[str, jax.Array]:
    """Tensors large enough that attention, gates and selections matter; norm weights differ from one."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        noise = rng.standard_normal(shape)
        if "norm" in name:
            value = 1.0 + 0.2 * noise
        elif name.endswith("router_bias"):
            value = 0.03 * noise
        elif "_router" in name:
            value = noise * 1.5 / math.sqrt(shape[-1])
        elif "embed_tokens" in name or "lm_head" in name:
            value = 0.5 * noise
        else:
            value = noise * 0.8 / math.sqrt(shape[-1])
        tensors[name] = value.astype(np.float32)
    return {name: jnp.asarray(value) for name, value in tensors.items()}


# One layer, one sequence.


def _rms_norm(x, weight, eps):
    return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def _rotate(x, theta):
    """x [seq, heads, head_dim]: pairs (i, i + head_dim/2) turned by position * theta^(-2i/head_dim)."""
    half = x.shape[-1] // 2
    speed = theta ** (-2.0 * np.arange(half) / x.shape[-1])
    angle = jnp.asarray(np.arange(x.shape[0])[:, None] * speed[None, :], jnp.float32)[:, None, :]
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle) + a * jnp.sin(angle)], -1)


def _softmax(x):
    e = jnp.exp(x - jnp.max(x, axis=-1, keepdims=True))
    return e / jnp.sum(e, axis=-1, keepdims=True)


def _layer(tensors, prefix, c, x, visible, cached=None, fresh=None):
    """One decoder layer on x [seq, d]. `visible` bool[seq]: the keys that exist. `cached`: keys and values to use
    instead of the layer's own, except at positions `fresh` bool[seq]. Returns the output and the keys and values used.
    """
    w = {name: tensors[f"{prefix}.{name}.weight"] for name in (*LINEARS, *NORMS)}
    seq, hd, heads, kv_heads = x.shape[0], c["head_dim"], c["num_attention_heads"], c["num_key_value_heads"]
    h = _rms_norm(x, w["input_layernorm"], c["rms_norm_eps"])
    q = _rotate((h @ w["self_attn.q_proj"].T).reshape(seq, heads, hd), c["rope_theta"])
    k = _rotate((h @ w["self_attn.k_proj"].T).reshape(seq, kv_heads, hd), c["rope_theta"])
    v = (h @ w["self_attn.v_proj"].T).reshape(seq, kv_heads, hd)
    if cached is not None:
        take = jnp.zeros(seq, bool) if fresh is None else fresh
        k = jnp.where(take[:, None, None], k, cached[0])
        v = jnp.where(take[:, None, None], v, cached[1])
    position = np.arange(seq)
    allowed = (position[None, :] <= position[:, None]) & visible[None, :]
    mixed = []
    for head in range(heads):
        group = head // (heads // kv_heads)
        scores = q[:, head] @ k[:, group].T / math.sqrt(hd)
        mixed.append(_softmax(jnp.where(allowed, scores, -1e30)) @ v[:, group])
    x = x + jnp.concatenate(mixed, -1) @ w["self_attn.o_proj"].T
    h = _rms_norm(x, w["post_attention_layernorm"], c["rms_norm_eps"])
    gate = h @ w["mlp.gate_proj"].T
    h = gate / (1.0 + jnp.exp(-gate)) * (h @ w["mlp.up_proj"].T)
    return x + h @ w["mlp.down_proj"].T, (k, v)


# Routers and their losses.


def _router(tensors, prefix, x):
    """Logits [seq, out] of a linear router, or of one with a hidden layer and the exact GELU."""
    if f"{prefix}.router.weight" in tensors:
        return x @ tensors[f"{prefix}.router.weight"].T
    h = x @ tensors[f"{prefix}.router.0.weight"].T
    h = 0.5 * h * (1.0 + jax.scipy.special.erf(h / math.sqrt(2.0)))
    return h @ tensors[f"{prefix}.router.2.weight"].T


def _cross_entropy(logits, targets):
    """Binary cross entropy with logits, elementwise."""
    return jnp.maximum(logits, 0) - logits * targets + jnp.log1p(jnp.exp(-jnp.abs(logits)))


def _log_sum_exp(x):
    top = jnp.max(x, axis=-1, keepdims=True)
    return (top + jnp.log(jnp.sum(jnp.exp(x - top), axis=-1, keepdims=True)))[..., 0]


def capacities(config: dict, seq: int, call: int | None = None) -> list[int]:
    """Tokens that each step selects; `call` counts the training forward passes from 1, None is evaluation."""
    fractions, warmup = [float(x) for x in config["mor"]["capacity"].split(",")], config["mor"]["expert"][
        "cap_warmup_step"]  # fmt: skip
    decay = 0.0
    if call is not None and warmup:
        decay = 0.5 * (1.0 + math.cos(math.pi * min(1.0, call / warmup)))
    return [max(1, int((c + (1.0 - c) * decay) * seq)) for c in fractions]


def _best(score, candidates, k):
    """bool[seq]: the k candidates with the highest score, the earlier position first among equals."""
    place = np.arange(score.shape[0])
    better = (score[None, :] > score[:, None]) | (
        (score[None, :] == score[:, None]) & (place[None, :] < place[:, None])
    )
    rank = jnp.sum(better & candidates[None, :], axis=1)
    return candidates & (rank < k)


# The recursion, one sequence at a time. x is [seq, d].


def _expert_choice(tensors, config, x, call):
    c, mor, expert = config["llama"], config["mor"], config["mor"]["expert"]
    _, block, _ = mor_layers(config)
    seq = x.shape[0]
    share, update = config["kv_sharing"]["enable"], config["kv_sharing"]["update_cache"]
    candidates = jnp.ones(seq, bool)
    out = {"selected": [], "gates": [], "margins": [], "stages": [], "sampling": 0.0, "z": 0.0}
    cache: list = [None] * len(block)
    for r, (prefix, k) in enumerate(zip(router_prefixes(config), capacities(config, seq, call), strict=True)):
        logit = _router(tensors, f"{prefix}.mor_router", x / mor["temp"])[:, 0]
        activation = {"sigmoid": lambda z: 1.0 / (1.0 + jnp.exp(-z)), "tanh": jnp.tanh}.get(expert["router_func"])
        score = logit if activation is None else expert["alpha"] * activation(logit)
        selected = _best(score, candidates, k)
        count = jnp.sum(candidates)
        losing = candidates & ~selected
        out["margins"].append(jnp.min(jnp.where(selected, logit, jnp.inf)) - jnp.max(
            jnp.where(losing, logit, -jnp.inf)))  # fmt: skip
        if expert["sampling"] == "aux_loss":
            sampled = logit
        elif expert["sampling"] == "aux_router":
            sampled = _router(tensors, f"{prefix}.mlp_router", jax.lax.stop_gradient(x))[:, 0]
        else:
            sampled = jnp.zeros(seq)
        bce = _cross_entropy(sampled, selected.astype(jnp.float32))
        if expert["sampling"] in ("aux_loss", "aux_router"):
            out["sampling"] += jnp.sum(jnp.where(candidates, bce, 0.0)) / count
        out["z"] += jnp.sum(jnp.where(candidates, _log_sum_exp(logit[:, None]) ** 2, 0.0)) / count
        h = x
        for j, layer in enumerate(block):
            if not share:
                h, _ = _layer(tensors, layer, c, h, selected)
            elif r == 0:  # all tokens write, selected or not
                h, cache[j] = _layer(tensors, layer, c, h, jnp.ones(seq, bool))
            else:
                h, _ = _layer(tensors, layer, c, h, jnp.ones(seq, bool), cache[j], selected if update else None)
        gate = jnp.where(selected, score, 0.0)
        weight = gate if expert["gating"] == "weighted" else selected.astype(jnp.float32)
        x = x + jnp.where(selected[:, None], weight[:, None] * h, 0.0)
        candidates = selected
        out["selected"].append(selected)
        out["gates"].append(gate)
        out["stages"].append(x)
    return x, out | {"depth": sum(s.astype(jnp.int32) for s in out["selected"])}


def _token_choice(tensors, config, x, call):
    c, mor, token = config["llama"], config["mor"], config["mor"]["token"]
    _, block, _ = mor_layers(config)
    (prefix,) = router_prefixes(config)
    seq, n = x.shape[0], steps(config)
    logits = _router(tensors, f"{prefix}.mor_router", x / mor["temp"])
    if token["router_func"] == "sigmoid":
        p = token["alpha"] / (1.0 + jnp.exp(-logits))
    else:
        p = token["alpha"] * _softmax(logits)
    ranked = p + tensors[f"{prefix}.router_bias"] if token["balancing"] == "loss_free" else p
    choice = jnp.argmax(ranked, axis=-1)
    ordered = jnp.sort(ranked, axis=-1)
    margins = [jnp.min(ordered[:, -1] - ordered[:, -2])]
    if call is not None and call < token["bal_warmup_step"]:
        choice = jnp.full_like(choice, n - 1)
    gate = sum(jnp.where(choice == i, p[:, i], 0.0) for i in range(n))
    result, h = x, x
    cache: list = [None] * len(block)
    everyone = jnp.ones(seq, bool)
    for r in range(n):
        active = choice >= r
        new = h
        for j, layer in enumerate(block):
            if not config["kv_sharing"]["enable"]:
                new, _ = _layer(tensors, layer, c, new, active)
            elif r == 0:
                new, cache[j] = _layer(tensors, layer, c, new, everyone)
            else:
                new, _ = _layer(tensors, layer, c, new, everyone, cache[j])
        weight = gate if token["gating"] == "weighted" else jnp.ones(seq)
        result = jnp.where((choice == r)[:, None], x + weight[:, None] * new, result)
        h = jnp.where((choice > r)[:, None], new, h)  # the unfinished continue without a gate
    z = jnp.mean(_log_sum_exp(logits) ** 2)
    depth = choice.astype(jnp.int32) + 1
    return result, {"depth": depth, "probabilities": p, "gate": gate, "z": z, "margins": margins, "stages": [result]}


def _sequence(tensors, config, tokens, call):
    """Everything about one row of tokens i32[seq]."""
    c = config["llama"]
    x = tensors["model.embed_tokens.weight"][tokens]
    everyone = jnp.ones(tokens.shape[0], bool)
    stages, routed = [x], {"depth": jnp.full(tokens.shape, steps(config), jnp.int32)}
    if is_mor(config):
        before, _, after = mor_layers(config)
        for prefix in before:
            x, _ = _layer(tensors, prefix, c, x, everyone)
            stages.append(x)
        x, routed = (_expert_choice if config["mor"]["type"] == "expert" else _token_choice)(tensors, config, x, call)
        stages += routed.pop("stages")
        for prefix in after:
            x, _ = _layer(tensors, prefix, c, x, everyone)
            stages.append(x)
    else:
        cache = {}
        for layer, (prefix, source) in enumerate(plain_layers(config)):
            x, cache[layer] = _layer(tensors, prefix, c, x, everyone, cache.get(source))
            stages.append(x)
    hidden = _rms_norm(x, tensors["model.norm.weight"], c["rms_norm_eps"])
    head = tensors["model.embed_tokens.weight" if c["tie_word_embeddings"] else "lm_head.weight"]
    return {"logits": hidden @ head.T, "hidden": hidden, "stages": stages, **routed}


def forward(tensors: dict, config: dict, tokens, call: int | None = None) -> dict:
    """The whole model on tokens i32[batch, seq]; `call` counts training forward passes from 1, None is evaluation.

    Returns logits f32[batch, seq, vocab]; hidden f32[batch, seq, d] after the final norm; stages, a list of
    f32[batch, seq, d]: the embeddings, then the stream after every layer (after every step of an expert-choice
    recursion, after the whole of a token-choice one); depth i32[batch, seq]; selected bool and gates f32, one
    [batch, seq] per step (expert choice); margin f32[], by how much the closest routing decision was won; losses,
    name -> (value, coefficient); apart, the same for losses that are not added to the language-model loss.
    """
    rows = [_sequence(tensors, config, tokens[b], call) for b in range(tokens.shape[0])]
    out = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
    mor = config["mor"]
    losses, apart = {}, {}
    if is_mor(config):
        if mor["type"] == "expert":
            group = {"aux_loss": losses, "aux_router": apart}.get(mor["expert"]["sampling"])
            if group is not None:
                group["aux_loss"] = (jnp.mean(out["sampling"]), mor["expert"]["coeff"])
        elif mor["token"]["balancing"] == "loss":
            n = steps(config)
            share = jnp.stack([jnp.mean((out["depth"] == i + 1).astype(jnp.float32)) for i in range(n)])
            value = jnp.sum(n * share * jnp.mean(out["probabilities"], axis=(0, 1)))
            losses["balancing_loss"] = (value, mor["token"]["coeff"])
        if mor["z_loss"]:
            losses["z_loss"] = (jnp.mean(out["z"]), mor["z_coeff"])
    margin = jnp.min(jnp.stack([jnp.min(m) for m in out.get("margins", [jnp.full(1, jnp.inf)])]))
    return out | {"margin": margin, "losses": losses, "apart": apart}


def total_loss(out: dict, tokens) -> jax.Array:
    """Mean cross entropy of the next tokens plus the weighted auxiliary losses."""
    logits, targets = out["logits"][:, :-1], tokens[:, 1:]
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    language = jnp.mean(_log_sum_exp(logits) - picked)
    return language + sum(value * coefficient for value, coefficient in out["losses"].values())


# Configurations.


def official(layers: int, *, recursive=None, kv=None, mor=None, expert=None, token=None, **llama) -> dict:
    """A tiny official configuration: defaults of the released recipes, with what is given changed."""
    return {
        "llama": {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers,
                  "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5,
                  "rope_theta": 10000.0, "tie_word_embeddings": True} | llama,
        "recursive": {"enable": True, "sharing": "middle_cycle", "num_recursion": 3, "base_depth": None,
                      "ln_share": True, "initialization": "stepwise"} | (recursive or {}),
        "kv_sharing": {"enable": False, "sharing": "middle_cycle", "num_recursion": 3, "base_depth": None,
                       "update_cache": False} | (kv or {}),
        "mor": {"enable": True, "type": "expert", "capacity": "1.0,0.6666666666666666,0.3333333333333333",
                "router_type": "linear", "temp": 1.0, "rand_router": False, "z_loss": False, "z_coeff": 0.001,
                "expert": {"router_func": "sigmoid", "alpha": 0.1, "sampling": "aux_loss", "coeff": 0.001,
                           "gating": "weighted", "include_first": True, "cap_warmup_step": 0} | (expert or {}),
                "token": {"router_func": "softmax", "alpha": 1.0, "balancing": "loss", "coeff": 0.1, "u": 0.001,
                          "gating": "weighted", "bal_warmup_step": 0} | (token or {})} | (mor or {}),
    }  # fmt: skip


def _plain_configs() -> dict[str, dict]:
    vanilla, off, share = {"enable": False}, {"enable": False}, {"enable": True}
    found = {
        "vanilla": official(4, recursive=vanilla, mor=off),
        "vanilla-untied": official(4, recursive=vanilla, mor=off, tie_word_embeddings=False),
        "recursive-one": official(6, recursive={"num_recursion": 1, "sharing": "cycle", "base_depth": 3}, mor=off),
        "recursive-drops": official(9, recursive={"num_recursion": 3}, mor=off),
    }
    for sharing, layers in (("cycle", 6), ("sequence", 6), ("middle_cycle", 8)):
        kv = share | {"sharing": sharing}
        found[f"vanilla-kv-{sharing}"] = official(layers, recursive=vanilla, kv=kv, mor=off)
        found[f"recursive-kv-{sharing}"] = official(layers, recursive={"sharing": sharing}, kv=share, mor=off)
    for sharing, layers in (("cycle", 6), ("sequence", 6), ("middle_cycle", 8), ("middle_sequence", 8)):
        found[f"recursive-{sharing}"] = official(layers, recursive={"sharing": sharing}, mor=off)
    return found


_CYCLE, _TWO, _HALVES = {"sharing": "cycle"}, {"num_recursion": 2}, {"capacity": "1.0,0.5"}
_Z = {"z_loss": True, "z_coeff": 0.01}


def _expert_configs() -> dict[str, dict]:
    share, update = {"enable": True}, {"enable": True, "update_cache": True}

    def two(expert=None, **mor):
        return official(6, recursive=_TWO, mor=_HALVES | mor, expert=expert)

    return {
        "expert": official(8),
        "expert-drops": official(9, mor=_Z, tie_word_embeddings=False),
        "expert-cycle": official(6, recursive=_CYCLE),
        "expert-cycle-kv": official(6, recursive=_CYCLE, kv=share, expert={"alpha": 0.7}),
        "expert-kv": official(8, kv=share),
        "expert-kv-small-first": official(8, kv=share, mor={"capacity": "0.75,0.5,0.25"}, expert={"alpha": 1.0}),
        "expert-hybrid": official(8, kv=update, expert={"alpha": 1.0}),
        "expert-small-first": official(8, mor={"capacity": "0.75,0.5,0.25"}, expert={"gating": "additive"}),
        "expert-mlp-tanh": two({"router_func": "tanh", "coeff": 0.01, "alpha": 0.5}, router_type="mlp"),
        "expert-wide": two(router_type="wide_mlp", **_Z),
        "expert-none": two({"router_func": None, "alpha": 0.3}),
        "expert-temp": two({"alpha": 1.0}, temp=1.7, **_Z),
        "expert-aux-router": two({"sampling": "aux_router"}, temp=1.3),
        "expert-aux-router-mlp": two({"sampling": "aux_router"}, router_type="mlp"),
        "expert-unsampled": two({"sampling": None}, **_Z),
        "expert-warmup": official(8, expert={"cap_warmup_step": 10}),
    }


def _token_configs() -> dict[str, dict]:
    share, chosen, z = {"enable": True}, {"type": "token"}, {"type": "token"} | _Z

    def two(token=None, kv=None, **mor):
        return official(6, recursive=_TWO, kv=kv, mor=_HALVES | chosen | mor, token=token)

    return {
        "token": official(8, mor=chosen),
        "token-cycle": official(6, recursive=_CYCLE, mor=z),
        "token-kv": official(8, kv=share, mor=z),
        "token-cycle-kv": official(6, recursive=_CYCLE, kv=share, mor=chosen),
        "token-mlp-temp": two({"alpha": 0.5}, router_type="mlp", temp=1.7),
        "token-wide-sigmoid": two({"router_func": "sigmoid", "alpha": 0.1}, router_type="wide_mlp", **_Z),
        "token-additive": two({"gating": "additive", "balancing": None}),
        "token-free": official(8, mor=chosen, token={"balancing": "loss_free"}),
        "token-free-sigmoid": two({"balancing": "loss_free", "router_func": "sigmoid", "alpha": 0.3}, share, **_Z),
        "token-warmup": two({"bal_warmup_step": 5}),
    }


def configs() -> dict[str, dict]:
    """Named tiny configurations: vanilla, recursive, expert choice and token choice with every option."""
    return _plain_configs() | _expert_configs() | _token_configs()
