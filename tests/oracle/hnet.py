"""The H-Net forward pass, stated a second time: slow, plain and in float64.

One sequence at a time and one position after another; chunks are lists that grow, the state-space layer and the moving
average are their recurrences, nothing is padded, packed or scanned, and nothing is imported from `adaptive`. Several
sequences packed into one row are several calls. What a fast implementation computes must come out of this one too
(H-Net paper, section 2; released code, modules/{isotropic,mha,dc,swiglu}.py; Mamba-2 paper, section 5). Tensors and
configuration are those of the released code: linear weights [out, in], names such as
backbone.encoder.layers.0.mixer.in_proj.weight. Two departures, both of arithmetic: everything is float64, also the
moving average, which the released code rounds to bfloat16.
"""

import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

EPS = 1e-5


class Stage(NamedTuple):
    """What the router of one stage decided about one sequence: p, b and the chunks' smoothed outputs' weights."""

    prob: np.ndarray  # f64[n]
    mask: np.ndarray  # bool[n]


class Output(NamedTuple):
    """One sequence's logits f64[n, vocab] and its stages from the outermost in; inner ones see chunks alone."""

    logits: np.ndarray
    stages: list[Stage]

    @property
    def margin(self) -> float:
        """How far the least certain decision is from falling the other way."""
        return min((float(np.abs(s.prob - 0.5).min()) for s in self.stages), default=0.5)


# Structure: what the configuration says about each stage.


def stages(config: dict) -> int:
    """Number of chunking stages; 0 for a plain stack."""
    layout, depth = config["arch_layout"], 0
    while len(layout) == 3:
        layout, depth = layout[1], depth + 1
    return depth


def blocks(text: str) -> list[str]:
    """The letters of one run of layers: T1m2 -> T, m, m."""
    return [letter for letter, count in re.findall(r"([mMtT])(\d+)", text) for _ in range(int(count))]


def stacks(config: dict) -> list[tuple[str, int, str]]:
    """(tensor prefix, stage, layout) of every stack of layers."""
    layout, prefix, found = config["arch_layout"], "backbone", []
    for stage in range(stages(config)):
        found += [(f"{prefix}.encoder", stage, layout[0]), (f"{prefix}.decoder", stage, layout[2])]
        layout, prefix = layout[1], f"{prefix}.main_network"
    return [*found, (f"{prefix}.main_network", stages(config), layout[0])]


def ssm_sizes(config: dict, stage: int) -> dict[str, int]:
    """Sizes of the Mamba-2 layers of a stage; a list has an entry for each."""
    given = {"expand": 2, "d_state": 128, "d_conv": 4, "headdim": 64} | config["ssm_cfg"]
    sizes = {name: value[stage] if isinstance(value, list) else value for name, value in given.items()}
    sizes["inner"] = sizes["expand"] * config["d_model"][stage]
    sizes["heads"] = sizes["inner"] // sizes["headdim"]
    return sizes


def hidden(config: dict, stage: int) -> int:
    """The feed-forward's size, which the released layer rounds up to a multiple of 128."""
    return -(-config["d_intermediate"][stage] // 128) * 128


def tensor_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the model that `config` describes."""
    widths, vocab = config["d_model"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"embeddings.weight": (vocab, widths[0])}
    if not config["tie_embeddings"]:
        shapes["lm_head.weight"] = (vocab, widths[0])
    for prefix, stage, text in stacks(config):
        d, s = widths[stage], ssm_sizes(config, stage)
        channels = s["inner"] + 2 * s["d_state"]
        for i, letter in enumerate(blocks(text)):
            layer = f"{prefix}.layers.{i}"
            shapes[f"{layer}.norm1.weight"] = (d,)
            if letter in "tT":
                shapes |= {f"{layer}.mixer.Wqkv.weight": (3 * d, d), f"{layer}.mixer.out_proj.weight": (d, d)}
            else:
                shapes |= {
                    f"{layer}.mixer.in_proj.weight": (s["inner"] + channels + s["heads"], d),
                    f"{layer}.mixer.conv1d.weight": (channels, 1, s["d_conv"]),
                    f"{layer}.mixer.conv1d.bias": (channels,),
                    f"{layer}.mixer.dt_bias": (s["heads"],),
                    f"{layer}.mixer.A_log": (s["heads"],),
                    f"{layer}.mixer.D": (s["heads"],),
                    f"{layer}.mixer.norm.weight": (s["inner"],),
                    f"{layer}.mixer.out_proj.weight": (d, s["inner"]),
                }
            if letter in "MT":
                f = hidden(config, stage)
                shapes |= {f"{layer}.norm2.weight": (d,), f"{layer}.mlp.fc1.weight": (2 * f, d)}
                shapes |= {f"{layer}.mlp.fc2.weight": (d, f)}
        shapes[f"{prefix}.rmsnorm.weight"] = (d,)
    prefix = "backbone"
    for stage, d in enumerate(widths):
        if stage and d > widths[stage - 1]:
            shapes[f"{prefix}.pad_dimension"] = (d - widths[stage - 1],)
        if stage < stages(config):
            shapes |= {f"{prefix}.routing_module.{x}_proj_layer.weight": (d, d) for x in "qk"}
            shapes |= {f"{prefix}.residual_proj.weight": (d, d), f"{prefix}.residual_proj.bias": (d,)}
        prefix += ".main_network"
    return shapes


def random_tensors(config: dict, seed: int) -> dict[str, np.ndarray]:
    """Tensors f32 far enough from their initial values that each of them matters: routers are no identities, the
    residual's projection is not zero, norm weights differ from one, and what a state forgets differs between heads."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        noise = rng.standard_normal(shape)
        last = name.rsplit(".", 2)[-2:]
        if "norm" in last[0]:
            value = 1.0 + 0.2 * noise
        elif "_proj_layer" in name:
            value = np.eye(shape[0]) + 0.5 * noise / math.sqrt(shape[0])
        elif last[-1] == "A_log":
            value = np.log(rng.uniform(1.0, 16.0, shape))
        elif last[-1] == "dt_bias":
            step = np.exp(rng.uniform(math.log(0.01), math.log(0.5), shape))
            value = step + np.log(-np.expm1(-step))
        elif last[-1] == "D":
            value = 1.0 + 0.3 * noise
        elif last == ["conv1d", "weight"]:
            value = 0.5 * noise
        elif len(shape) == 1:  # biases, pad_dimension
            value = 0.2 * noise
        elif last[0] == "embeddings":
            value = noise
        else:
            value = noise / math.sqrt(shape[-1])
        tensors[name] = value.astype(np.float32)
    return tensors


# Parts, each on one sequence x [n, width].


def _sigmoid(x):
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def _silu(x):
    return x * _sigmoid(x)


def rms_norm(x, weight):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPS) * weight


def _rotate(x, position, dim):
    """x [heads, head_dim] at one position: the first `dim` channels turned, in pairs (i, i + dim/2)."""
    half = dim // 2
    angle = position * 10_000.0 ** (-2.0 * np.arange(half) / dim) if dim else np.zeros(0)
    a, b, rest = x[:, :half], x[:, half:dim], x[:, dim:]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([a * cos - b * sin, a * sin + b * cos, rest], axis=-1)


def attention(w, x, heads, rotary, window):
    """Causal attention, positions counted from the sequence's own start; window w >= 0 sees i-w ... i."""
    n, d = x.shape
    q, k, v = np.split(x @ w["Wqkv.weight"].T, 3, axis=-1)
    q, k = ([_rotate(a[i].reshape(heads, -1), i, rotary) for i in range(n)] for a in (q, k))
    v = v.reshape(n, heads, -1)
    mixed = np.zeros((n, heads, d // heads))
    for i in range(n):
        first = max(0, i - window) if window >= 0 else 0
        for h in range(heads):
            score = np.array([q[i][h] @ k[j][h] for j in range(first, i + 1)]) / math.sqrt(d // heads)
            weight = np.exp(score - score.max())
            mixed[i, h] = weight / weight.sum() @ v[first : i + 1, h]
    return mixed.reshape(n, d) @ w["out_proj.weight"].T


def mamba(w, x, sizes):
    """The Mamba-2 layer as its recurrence: S_t = exp(dt A) S_{t-1} + dt x B^T, y_t = S_t C + D x."""
    inner, heads, states, taps = (sizes[name] for name in ("inner", "heads", "d_state", "d_conv"))
    z, xbc, dt = np.split(x @ w["in_proj.weight"].T, [inner, 2 * inner + 2 * states], axis=-1)
    kernel, decay = w["conv1d.weight"][:, 0], -np.exp(w["A_log"])
    state = np.zeros((heads, inner // heads, states))
    out = np.zeros((len(x), inner))
    for t in range(len(x)):
        mixed = w["conv1d.bias"] + sum(kernel[:, taps - 1 - j] * xbc[t - j] for j in range(min(taps, t + 1)))
        u, b, c = np.split(_silu(mixed), [inner, inner + states])
        u, step = u.reshape(heads, -1), np.log1p(np.exp(dt[t] + w["dt_bias"]))
        state = np.exp(step * decay)[:, None, None] * state + (step[:, None] * u)[:, :, None] * b
        y = state @ c + w["D"][:, None] * u
        out[t] = rms_norm(y.reshape(-1) * _silu(z[t]), w["norm.weight"])
    return out @ w["out_proj.weight"].T


def swiglu(w, x):
    value, gate = np.split(x @ w["fc1.weight"].T, 2, axis=-1)
    return (_silu(gate) * value) @ w["fc2.weight"].T


def _under(tensors, prefix):
    return {name[len(prefix) + 1 :]: value for name, value in tensors.items() if name.startswith(f"{prefix}.")}


def stack(tensors, prefix, text, config, stage, x):
    """Layers with a carried residual, and one norm at the end."""
    attn = {name: value[stage] for name, value in config["attn_cfg"].items()}
    for i, letter in enumerate(blocks(text)):
        layer = _under(tensors, f"{prefix}.layers.{i}")
        h, mixer = rms_norm(x, layer["norm1.weight"]), _under(layer, "mixer")
        if letter in "tT":
            x = x + attention(mixer, h, attn["num_heads"], attn["rotary_emb_dim"], attn["window_size"])
        else:
            x = x + mamba(mixer, h, ssm_sizes(config, stage))
        if letter in "MT":
            x = x + swiglu(_under(layer, "mlp"), rms_norm(x, layer["norm2.weight"]))
    return rms_norm(x, tensors[f"{prefix}.rmsnorm.weight"])


def route(tensors, prefix, x):
    """p and b of every position: half of one minus the cosine to the position before; the first is a boundary."""
    prob = np.ones(len(x))
    for t in range(1, len(x)):
        q = tensors[f"{prefix}.routing_module.q_proj_layer.weight"] @ x[t - 1]
        k = tensors[f"{prefix}.routing_module.k_proj_layer.weight"] @ x[t]
        cosine = q @ k / (max(np.sqrt(q @ q), 1e-12) * max(np.sqrt(k @ k), 1e-12))
        prob[t] = min(max((1.0 - cosine) / 2.0, 0.0), 1.0)
    return Stage(prob, prob > 0.5)


def smooth(z, prob):
    """z̄_k = P_k z_k + (1 - P_k) z̄_{k-1}, from zero, with P kept off its ends."""
    last, out = np.zeros(z.shape[1]), []
    for vector, p in zip(z, prob, strict=True):
        p = min(max(p, 1e-4), 1.0 - 1e-4)
        last = p * vector + (1.0 - p) * last
        out.append(last)
    return np.array(out)


def network(tensors, config, prefix, layout, stage, x, near):
    """One stage on x [n, its outer width] -> (the same shape, the routers' decisions from here in).

    `near`, decisions of a former pass, replaces the confidence c by c - c' + 1, with c' that pass's: at its tensors the
    value is the same and the derivative is the straight-through estimator's, which finite differences can then see.
    """
    outer = x.shape[1]
    if f"{prefix}.pad_dimension" in tensors:
        x = np.concatenate([x, np.tile(tensors[f"{prefix}.pad_dimension"], (len(x), 1))], axis=-1)
    if len(layout) == 1:
        return stack(tensors, f"{prefix}.main_network", layout[0], config, stage, x)[:, :outer], []
    h = stack(tensors, f"{prefix}.encoder", layout[0], config, stage, x)
    residual = h @ tensors[f"{prefix}.residual_proj.weight"].T + tensors[f"{prefix}.residual_proj.bias"]
    mine = route(tensors, f"{prefix}", h)
    chunks = h[mine.mask]
    inside = near[1:] if near else None
    z, inner = network(tensors, config, f"{prefix}.main_network", layout[1], stage + 1, chunks, inside)
    z = smooth(z, mine.prob[mine.mask])
    y = np.zeros_like(h)
    confident = np.where(mine.mask, mine.prob, 1.0 - mine.prob)
    former = np.where(near[0].mask, near[0].prob, 1.0 - near[0].prob) if near else confident
    chunk = -1
    for t in range(len(h)):
        chunk += int(mine.mask[t])
        y[t] = z[chunk] * (1.0 + confident[t] - former[t]) + residual[t]
    out = stack(tensors, f"{prefix}.decoder", layout[2], config, stage, y)
    return out[:, :outer], [mine, *inner]


def forward(tensors: dict, config: dict, tokens, near: list[Stage] | None = None) -> Output:
    """The model on one sequence of tokens; `near` (see `network`) is for finite differences alone."""
    tensors = {name: np.asarray(value, np.float64) for name, value in tensors.items()}
    x = tensors["embeddings.weight"][np.asarray(tokens)]
    x, found = network(tensors, config, "backbone", config["arch_layout"], 0, x, near)
    head = tensors["embeddings.weight" if config["tie_embeddings"] else "lm_head.weight"]
    return Output(x @ head.T, found)


# Losses over several sequences, each positions' mean.


def ratio_losses(outputs: list[Output], targets: list[float], kept: list[Output] | None = None) -> list[float]:
    """N/(N-1) ((N-1) F G + (1-F)(1-G)) of each stage, F and G being means over all sequences' positions of the stage.

    `kept` takes F, which has no gradient, from another pass."""
    losses = []
    for stage, n in enumerate(targets):
        f = np.concatenate([o.stages[stage].mask for o in kept or outputs]).mean()
        g = np.concatenate([o.stages[stage].prob for o in outputs]).mean()
        losses.append(float(n / (n - 1.0) * ((n - 1.0) * f * g + (1.0 - f) * (1.0 - g))))
    return losses


def cross_entropy(outputs: list[Output], sequences) -> float:
    """Mean nats of every next token inside each sequence."""
    nats = []
    for out, tokens in zip(outputs, sequences, strict=True):
        for t in range(len(tokens) - 1):
            row = out.logits[t]
            top = row.max()
            nats.append(top + math.log(np.exp(row - top).sum()) - row[tokens[t + 1]])
    return float(np.mean(nats))


def total_loss(tensors, config, sequences, targets, weight=0.03, near: list[Output] | None = None) -> float:
    """Cross-entropy and the weighted ratio losses; with `near` (a former pass) as finite differences need it."""
    outputs = [forward(tensors, config, tokens, near[i].stages if near else None) for i, tokens in enumerate(sequences)]
    return cross_entropy(outputs, sequences) + weight * sum(ratio_losses(outputs, targets, near))


# Tiny configurations.


def official(layout, widths, *, vocab=40, ff=0, heads=2, rotary=4, window=-1, ssm=None, tie=False) -> dict:
    """A configuration as the released code writes it; scalars are repeated for every stage."""

    def each(value):
        return value if isinstance(value, list) else [value] * len(widths)

    return {
        "arch_layout": layout,
        "d_model": widths,
        "d_intermediate": each(ff),
        "vocab_size": vocab,
        "ssm_cfg": {"chunk_size": 256, "d_conv": 4, "d_state": 8, "expand": 2, "headdim": 8} | (ssm or {}),
        "attn_cfg": {"num_heads": each(heads), "rotary_emb_dim": each(rotary), "window_size": each(window)},
        "tie_embeddings": tie,
    }


def configs() -> dict[str, dict]:
    """Named tiny configurations: every depth, letter and option."""
    plain = {"chunk_size": 16, "d_conv": 4, "d_state": 16, "expand": 2}
    published = official(["m2", ["T2"], "m2"], [32, 64], ff=[0, 100], heads=[2, 4], rotary=[8, 8], window=[15, -1])
    stage_lists = {"d_state": [8, 12], "d_conv": [4, 3], "expand": [2, 1], "headdim": [4, 8]}
    return {
        "one": official(["m1", ["T1"], "m1"], [16, 24], ff=[0, 100], heads=[2, 3], rotary=[4, 4]),
        "one-published": published | {"ssm_cfg": plain},  # with the released heads of 64
        "one-same-width": official(["m2", ["T2"], "m1"], [16, 16], ff=[0, 128], window=[3, -1], tie=True),
        "one-hybrid": official(["M1t1", ["T1m2"], "t1m1"], [16, 24], ff=[64, 130], rotary=[8, 6], window=[4, 6]),
        "one-attention": official(["T1", ["t2"], "t1T1"], [16, 16], ff=[128, 0], heads=4, rotary=2, window=[3, 2]),
        "one-lists": official(["m1M1", ["M1t1"], "m2"], [16, 16], ff=[32, 64], ssm=stage_lists),
        "two": official(
            ["m2", ["T1m1", ["T2"], "m1T1"], "m2"], [16, 16, 24], ff=[0, 64, 128], heads=[2, 2, 3], window=[5, 5, -1]
        ),
        "two-widening": official(["m1", ["T1m2", ["M1t1"], "m1"], "m1"], [16, 24, 32], ff=[0, 64, 64], tie=True),
        "three": official(["m1", ["m1", ["t1m1", ["T1"], "m1"], "m1"], "m1"], [16, 16, 24, 32], ff=[0, 0, 0, 128]),
    }


# Gradients that another implementation's automatic differentiation gave.

_FIXTURE = Path(__file__).parent / "fixtures" / "hnet-gradients.npz"


class Recorded(NamedTuple):
    """A batch, its loss, and some entries (see `sample`) and the largest of each tensor's gradient."""

    seed: int  # of `random_tensors`
    rows: np.ndarray  # i64[batch, seq], each a sequence
    targets: list[float]
    weight: float
    loss: float
    gradients: dict[str, np.ndarray]
    largest: dict[str, float]


def sample(size: int, most: int = 64) -> np.ndarray:
    """Which entries of a flattened tensor the recorded gradients hold: all of a small one, else some at random."""
    return np.arange(size) if size <= most else np.sort(np.random.default_rng(size).permutation(size)[:most])


def recorded(name: str) -> Recorded:
    """What a plain PyTorch implementation of the same formulas, in float64, gave for one of `configs`."""
    config = configs()[name]
    with np.load(_FIXTURE) as fixture:
        meta, values, largest = json.loads(str(fixture["meta"])), fixture[name], fixture[f"{name}|largest"]
    sizes = {key: math.prod(shape) for key, shape in tensor_shapes(config).items()}
    ends = np.cumsum([len(sample(size)) for size in sizes.values()])
    assert ends[-1] == len(values)
    gradients = dict(zip(sizes, np.split(values, ends[:-1]), strict=True))
    targets = meta["targets"][: stages(config)]
    bounds = dict(zip(sizes, largest.tolist(), strict=True))
    rows = np.array(meta["rows"])
    return Recorded(meta["seeds"][name], rows, targets, meta["weight"], meta["loss"][name], gradients, bounds)
