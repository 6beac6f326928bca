"""Layers of models of `adaptive` in PyTorch, for `modeling_adaptive.py`: functions of parameters and settings."""

import math

import torch
from torch.nn import functional as F

from .routers_adaptive import ACTIVATIONS, OWN_LAYERS, ROUTERS, input_scale

HIDDEN = -1e30  # a score that no query sees; finite, so that a query that sees nothing has no NaN


class Weights:
    """Parameters below a path; of stacked ones those of a layer and a pass. apart: names of those that each pass has
    for itself."""

    def __init__(self, named, apart):
        self._named, self._apart = named, apart

    def below(self, path):
        cut = len(path) + 1
        named = {n[cut:]: v for n, v in self._named.items() if n.startswith(f"{path}/")}
        return Weights(named, {n[cut:] for n in self._apart if n.startswith(f"{path}/")})

    def at(self, layer, index):
        """Those of a layer, in pass `index`."""
        return Weights({n: (v[index] if n in self._apart else v)[layer] for n, v in self._named.items()}, set())

    def __getitem__(self, name):
        return self._named[name]

    def get(self, name):
        return self._named.get(name)


class Where:
    """place i64[rows, n] in the text; there bool[rows, n]: positions that exist; below: what the last router of experts
    left for the next one, under "logits"."""

    def __init__(self, place, there, below=None):
        self.place, self.there, self.below = place, there, {} if below is None else below

    def only(self, active):
        return Where(self.place, active, self.below)


# Parts


def rms_norm(x, weight, eps):
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def norm(w, name, x, eps):
    weight, bias = w.get(f"{name}/weight"), w.get(f"{name}/bias")
    if weight is None:
        return x
    return rms_norm(x, weight, eps) if bias is None else F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def frequencies(place, dim, theta, scaling):
    """(f32[rows or 1, 1, dim / 2], what cos and sin are multiplied by)."""
    powers = -torch.arange(0, dim, 2, dtype=torch.float32, device=place.device) / dim
    plain = theta**powers
    kind = scaling["kind"] if scaling else ""
    if kind == "linear":
        plain = plain / scaling["factor"]
    if kind == "llama3":
        turns = scaling["trained"] * plain / (2 * math.pi)
        kept = ((turns - scaling["low"]) / (scaling["high"] - scaling["low"])).clamp(0, 1)
        plain = (1 - kept) * plain / scaling["factor"] + kept * plain
    if kind == "dynamic" and dim >= 4:
        length = (place.max(1).values + 1).clamp(min=scaling["trained"]).float()
        grown = scaling["factor"] * length / scaling["trained"] - (scaling["factor"] - 1)
        return (theta * grown ** (dim / (dim - 2)))[:, None, None] ** powers, 1.0
    if kind == "yarn":
        at = lambda turns: dim * math.log(scaling["trained"] / (turns * 2 * math.pi)) / (2 * math.log(theta))  # noqa: E731
        low, high = at(scaling["fast"]), at(scaling["slow"])
        if scaling["truncate"]:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        ramp = (torch.arange(dim // 2, device=place.device) - low) / ((high - low) or 0.001)
        ramp = ramp.clamp(0, 1)
        plain = plain / scaling["factor"] * ramp + plain * (1 - ramp)
        return plain[None, None], scaling["attention"] or 0.1 * math.log(scaling["factor"]) + 1
    return plain[None, None], 1.0


def rotate(x, place, s):
    dim = s["head_dim"] if s["rotary_dim"] < 0 else s["rotary_dim"]
    if not dim:
        return x
    per_place, by = frequencies(place, dim, s["rope_theta"], s["rope_scaling"])
    angles = place.float()[..., None] * per_place
    cos, sin = ((f(angles) * by).to(x.dtype)[:, :, None] for f in (torch.cos, torch.sin))
    half = dim // 2
    first, second, rest = x[..., :half], x[..., half:dim], x[..., dim:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


def project(w, name, x, s, eps):
    out = torch.einsum("bnd,dhe->bnhe", x, w[name])
    bias, scale = w.get(f"{name}_bias"), w.get(f"{name}_norm/weight")
    out = out if bias is None else out + bias
    if scale is not None:
        full = scale.shape[-1] != out.shape[-1]
        out = rms_norm(out.flatten(2), scale, eps).view_as(out) if full else rms_norm(out, scale, eps)
    return out.clamp(-s["clip_qkv"], s["clip_qkv"]) if s["clip_qkv"] else out


def attention(w, s, x, where, eps, kept=None, fresh=True):
    """(update, (keys, values, positions that have some)). kept: those of an earlier pass, which are read in place of
    the own ones, or, with `fresh`, where the own ones do not exist."""
    q = rotate(project(w, "q", x, s, eps), where.place, s)
    if kept is None or fresh:
        k, v = rotate(project(w, "k", x, s, eps), where.place, s), project(w, "v", x, s, eps)
        there = where.there
        if kept is not None:
            own = there[..., None, None]
            k, v, there = torch.where(own, k, kept[0]), torch.where(own, v, kept[1]), there | kept[2]
    else:
        k, v, there = kept
    groups = q.shape[2] // k.shape[2]
    scores = torch.einsum("bqhe,bkhe->bhqk", q, k.repeat_interleave(groups, 2)).float()
    scores = scores * (s["scale"] or s["head_dim"] ** -0.5)
    if s["soft_cap"]:
        scores = s["soft_cap"] * torch.tanh(scores / s["soft_cap"])
    index = torch.arange(x.shape[1], device=x.device)
    seen = (index[None, :] <= index[:, None])[None] & there[:, None, :]
    if s["window"]:
        seen = seen & (where.place[:, None, :] > where.place[:, :, None] - s["window"])
    weights = torch.softmax(scores.masked_fill(~seen[:, None], HIDDEN), -1).to(x.dtype)
    out = torch.einsum("bhqk,bkhe->bqhe", weights, v.repeat_interleave(groups, 2))
    out = torch.einsum("bqhe,hed->bqd", out, w["o"])
    bias = w.get("o_bias")
    return out if bias is None else out + bias, (k, v, there)


def dense(w, s, x, where=None):
    gate = x @ w["gate"]
    gate = F.gelu(gate, approximate="tanh") if s["activation"] == "gelu_tanh" else F.silu(gate)
    return (gate * (x @ w["up"])) @ w["down"]


def mlp(w, s, x, where=None):
    return F.gelu(x @ w["up"] + w["up_bias"], approximate="tanh") @ w["down"] + w["down_bias"]


def experts(w, s, x, where):
    if s["router"]["kind"] in OWN_LAYERS:
        return OWN_LAYERS[s["router"]["kind"]](w, s, x, where).to(x.dtype)
    act, (weights, more) = ACTIVATIONS[s["activation"]], ROUTERS[s["router"]["kind"]](w.below("router"), s, x, where)
    up, gate, down = w["experts/up"], w.get("experts/gate"), w["experts/down"]
    out, given = torch.zeros_like(x, dtype=torch.float32), x
    x = x * input_scale(s["router"])
    for e in range(s["experts"]):
        row, column = (weights[..., e] != 0).nonzero(as_tuple=True)
        own = x[row, column]
        hidden = act(own @ up[e]) if gate is None else act(own @ gate[e]) * (own @ up[e])
        out = out.index_put((row, column), weights[row, column, e, None] * (hidden @ down[e]).float(), accumulate=True)
    if s["shared_size"]:
        out = out + dense(w.below("shared"), {"activation": "silu"}, given)
    return (out if more is None else out + more).to(x.dtype)


FEED_FORWARDS = {"dense": dense, "mlp": mlp, "experts": experts}


def mamba2(w, s, x, where, eps):
    """Positions that do not exist neither decay nor write, and the convolution passes over them."""
    order = torch.argsort((~where.there).long(), dim=1, stable=True)
    back, there = torch.argsort(order, dim=1), where.there.gather(1, order)
    h = x.gather(1, order[..., None].expand_as(x))
    z, inner = (torch.einsum("bnw,whe->bnhe", h, w[name]) for name in ("z", "x"))
    inner = convolved(inner, w["conv_x"], w["conv_x_bias"])
    b, c = convolved(h @ w["bc"], w["conv_bc"], w["conv_bc_bias"]).float().chunk(2, -1)
    dt = F.softplus((h @ w["dt"]).float() + w["dt_bias"]) * there[..., None]
    decay = torch.exp(dt * -torch.exp(w["a_log"]))
    state, found = h.new_zeros(*inner.shape[:1], *inner.shape[2:], b.shape[-1], dtype=torch.float32), []
    for t in range(h.shape[1]):
        write = (dt[:, t, :, None] * inner[:, t].float())[..., None] * b[:, t, None, None]
        state = decay[:, t, :, None, None] * state + write
        found.append((state * c[:, t, None, None]).sum(-1))
    y = (torch.stack(found, 1) + w["d"][:, None] * inner.float()) * F.silu(z.float())
    y = y * torch.rsqrt(y.pow(2).mean((-2, -1), keepdim=True) + eps) * w["norm"]
    out = torch.einsum("bnhe,hew->bnw", y.to(x.dtype), w["out"])
    return out.gather(1, back[..., None].expand_as(out))


def convolved(x, weight, bias):
    taps = weight.shape[0]
    padded = torch.cat([x.new_zeros(x.shape[0], taps - 1, *x.shape[2:]), x], 1)
    return F.silu(bias + sum(weight[i] * padded[:, i : i + x.shape[1]] for i in range(taps)))


def block(w, s, x, where, eps, kept, fresh):
    mixer, feed_forward, after, where.eps = s["mixer"], s["feed_forward"], None, eps
    if mixer is not None:
        own, below = norm(w, "mixer_norm", x, eps), w.below("mixer")
        if mixer["kind"] == "mamba2":
            update = mamba2(below, mixer, own, where, eps)
        else:
            update, after = attention(below, mixer, own, where, eps, kept, fresh)
        x = x + norm(w, "mixer_out_norm", update, eps)
    if feed_forward is not None:
        own = norm(w, "feed_forward_norm", x, eps)
        update = FEED_FORWARDS[feed_forward["kind"]](w.below("feed_forward"), feed_forward, own, where)
        x = x + norm(w, "feed_forward_out_norm", update, eps)
    return x, after


def stack(w, s, x, where, eps, kept=None, fresh=True, index=0):
    """(the stream after the blocks, keys and values of each); index: of a recursion's pass."""
    after, layer_of = {}, [0] * len(s["blocks"])
    for _ in range(s["repeats"]):
        for i, own in enumerate(s["blocks"]):
            below = w.below(f"blocks/{i}")
            for _ in range(own["repeat"]):
                here = below.at(layer_of[i], index)
                place = i, layer_of[i]
                x, after[place] = block(here, own, x, where, eps, kept and kept[place], fresh)
                layer_of[i] += 1
    return x, after
