"""Routers of experts of models of `adaptive` in PyTorch, for `layers_adaptive.py`, as they decide while generating."""

import math

import torch
from torch.nn import functional as F

HIDDEN = -1e30  # of an expert that is not chosen; finite


def token_choice(w, s, x, where):
    """See ROUTERS."""
    o = s["router"]
    if o["score"] == "cosine":
        unit = lambda a, axis: a / a.norm(dim=axis, keepdim=True).clamp(min=1e-12)  # noqa: E731
        cosine = unit(x.float() @ w["projection"], -1) @ unit(w["weight"], 0)
        logits = cosine * w["temperature"].clamp(max=math.log(100.0)).exp()
    else:
        logits = x.float() @ w["weight"].float()
    softmax = torch.softmax(logits, -1)
    scores = torch.sigmoid(logits) if o["score"] == "sigmoid" else softmax
    choice = logits if o["score"] == "logits" else scores
    choice = choice if w.get("bias") is None else choice + w["bias"]
    if o["groups"] != o["kept_groups"]:
        split = choice.unflatten(-1, (o["groups"], -1))
        best = split.topk(2 if o["group_score"] == "top2" else 1, -1).values.sum(-1)
        kept = torch.zeros_like(best, dtype=torch.bool).scatter(-1, best.topk(o["kept_groups"], -1).indices, True)
        choice = split.masked_fill(~kept[..., None], -math.inf).flatten(-2)
    index = choice.topk(o["experts_per_token"], -1).indices
    if o["score"] == "logits" and o["normalise"]:
        weights = torch.softmax(logits.gather(-1, index), -1)
    else:
        weights = scores.gather(-1, index)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) if o["normalise"] else weights
    return torch.zeros_like(logits).scatter(-1, index, weights * o["route_scale"]), None


def expert_choice(w, s, x, where):
    """Each token alone, by the running threshold or by what predicts the choice."""
    o, logits = s["router"], x.float() @ w["weight"].float()
    softmax = torch.softmax(logits, -1)
    if o["decode"] == "predictor":
        taken = x.float() @ w["predictor"].float() > 0
    else:
        taken = (softmax if o["score"] == "softmax" else logits) > w["threshold"]
    if o["score"] == "softmax":
        weights = softmax * taken
    elif o["score"] == "selected":
        weights = torch.softmax(logits.masked_fill(~taken, HIDDEN), -1) * taken
    else:
        weights = torch.sigmoid(logits) * taken
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * o["route_scale"], None


def top_p(w, s, x, where):
    o, logits = s["router"], x.float() @ w["weight"].float()
    index = torch.argsort(logits, dim=-1, descending=True, stable=True)
    ranked = torch.softmax(logits, -1).gather(-1, index)
    wanted = torch.cat([torch.ones_like(ranked[..., :1]) > 0, ranked.cumsum(-1)[..., :-1] <= o["p"]], -1)
    return by_rank(logits, index, wanted, o["most"] or s["experts"]), None


def dynamoe(w, s, x, where):
    """Experts whose logit reaches the running threshold."""
    logits = x.float() @ w["weight"].float()
    index = torch.argsort(logits, dim=-1, descending=True, stable=True)
    wanted = (logits.gather(-1, index) >= w["threshold"]) | (torch.arange(s["experts"], device=x.device) == 0)
    return by_rank(logits, index, wanted, w["limit"]), None


def by_rank(logits, index, wanted, limit):
    """Weights of the first `limit` wanted of `index`, which has all experts, best first: the softmax over those."""
    wanted = wanted & (torch.arange(index.shape[-1], device=index.device) < limit)
    chosen = torch.softmax(logits.gather(-1, index).masked_fill(~wanted, HIDDEN), -1) * wanted
    return torch.zeros_like(logits).scatter(-1, index, chosen)


def rms(a, eps):
    return a * torch.rsqrt(a.pow(2).mean(-1, keepdim=True) + eps)


def remoe(w, s, x, where):
    weights, gain = torch.relu(x.float() @ w["weight"].float()), w.get("gain")
    return (weights if gain is None else rms(weights, s["router"]["norm_eps"]) * gain), None


def blockffn(w, s, x, where):
    return rms(torch.relu(x.float() @ w["weight"].float()), s["router"]["norm_eps"]) * w["gain"], None


def adamoe(w, s, x, where):
    """Some choices are nulls, which give nothing."""
    o, logits = s["router"], x.float() @ w["weight"].float()
    index = logits.topk(o["experts_per_token"], -1).indices
    true = (index < s["experts"]) | (o["normalise"] != "true")
    chosen = torch.softmax(logits.gather(-1, index).masked_fill(~true, HIDDEN), -1) * true
    return torch.zeros_like(logits).scatter(-1, index, chosen)[..., : s["experts"]], None


def longcat(w, s, x, where):
    """Some choices return the token itself."""
    o, p = s["router"], torch.softmax(x.float() @ w["weight"].float(), -1)
    index = (p + w["bias"]).topk(o["experts_per_token"], -1).indices
    weights = torch.zeros_like(p).scatter(-1, index, p.gather(-1, index) * o["route_scale"])
    return weights[..., : s["experts"]], x.float() * weights[..., s["experts"] :].sum(-1, keepdim=True)


def acm(w, s, x, where):
    """The first so many learners, a number that is chosen, beside a vector that every token gets."""
    h, i = x.float(), 0
    while w.get(f"hidden/{i}/weight") is not None:
        h, i = F.gelu(h @ w[f"hidden/{i}/weight"] + w[f"hidden/{i}/bias"]), i + 1
    logits = h @ w["weight"] + w["bias"]
    number = torch.arange(s["experts"] + 1, device=x.device)
    count = logits.masked_fill(number < s["router"]["least"], HIDDEN).argmax(-1, keepdim=True)
    return (number[:-1] < count).float(), w["base"].expand(x.shape).float()


def moe_pp(w, s, x, where):
    """Some choices compute next to nothing: a mixture with a constant, the token itself, zero."""
    o, k = s["router"], s["router"]["experts_per_token"]
    logits, second = x.float() @ w["weight"].float(), w.get("second")
    logits = logits if second is None else torch.tanh(logits) @ second
    if w.get("residual") is not None and "logits" in where.below:
        logits = logits + where.below["logits"] @ w["residual"]
    where.below["logits"] = logits
    scores = logits
    if o["logits_norm"]:
        scores = logits * (o["logits_norm"] / torch.sqrt(logits.var(-1, keepdim=True) + 1e-20))
    index = scores.topk(k, -1).indices
    counted = (index < scores.shape[-1] - o["zero"]) | o["mixtral_gating"]
    chosen = torch.softmax(scores.gather(-1, index).masked_fill(~counted, HIDDEN), -1) * counted
    weights = torch.zeros_like(scores).scatter(-1, index, chosen)
    weights, rest = weights[..., : s["experts"]], weights[..., s["experts"] :]
    x, n = x.float() * input_scale(o), o["constant"]
    passed, more = rest[..., n : n + o["copy"]].sum(-1), 0.0
    if n:
        mix = torch.softmax(torch.einsum("bsd,jdc->bsjc", x, w["constant_gate"]), -1) * rest[..., :n, None]
        passed, more = passed + mix[..., 0].sum(-1), mix[..., 1] @ w["constant"]
    return weights, x * passed[..., None] + more


def input_scale(router):
    """What experts' inputs are multiplied by."""
    scaled = router["kind"] == "moe_pp" and router["input_scale"] and not router["mixtral_gating"]
    return float(router["experts_per_token"]) if scaled else 1.0


ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}


def duo_llm(w, s, x, where):
    """Each token takes a large feed-forward, a small one, or none."""
    o = s["router"]
    choice = (x.float() @ w["router/weight"].float()).argmax(-1)
    if o["slack"]:
        n = x.shape[1]
        most = max(1, min(n, math.ceil(round(o["slack"] * o["budget"] * n, 9))))
        wants = (choice == 0) & where.there
        choice = torch.where(wants & (wants.long().cumsum(1) > most), 1, choice)
    out, act = torch.zeros_like(x, dtype=torch.float32), ACTIVATIONS[s["activation"]]
    for number, name in enumerate(("big", "small")):
        up, gate = x @ w[f"{name}/up"][0], w.get(f"{name}/gate")
        hidden = act(up) if gate is None else act(x @ gate[0]) * up
        out = out + (choice == number)[..., None] * (hidden @ w[f"{name}/down"][0]).float()
    return out


def versatile(w, s, x, where):
    """Slices of one feed-forward, mixed with the whole of it, once or several times over."""
    o, n, size = s["router"], s["experts"], s["expert_size"]
    gate, up, down = (w[f"feed_forward/{name}"] for name in ("gate", "up", "down"))
    normed = lambda h: rms(h.float(), where.eps).mul(w["norm/weight"].float()).to(h.dtype)  # noqa: E731
    count = (x.float() @ w["loops/weight"].float()).argmax(-1) + 1
    share = ((o["loops"] - count) / o["loops"])[..., None]
    logits = x.float() @ w["router/weight"].float()
    index = logits.topk(o["experts_per_token"], -1).indices
    weights = torch.zeros_like(logits).scatter(-1, index, torch.softmax(logits.gather(-1, index), -1))
    hidden = F.silu(normed(x) @ gate) * (normed(x) @ up)
    wide = torch.zeros_like(x, dtype=torch.float32)
    for e in range(n):
        first = e * size if o["slices"] == "equal" else e * (o["hidden"] - size) // max(n - 1, 1)
        own = hidden[..., first : first + size] @ down[first : first + size]
        wide = wide + weights[..., e, None] * own.float()
    h = x
    for loop in range(o["loops"]):
        step = (F.silu(normed(h) @ gate) * (normed(h) @ up)) @ down
        h = h + (count > loop)[..., None] * step
    return share * wide + (1 - share) * (h - x).float()


# Each gives (weights f32[rows, n, experts], 0 where an expert does not compute the token; what is added besides, or
# None). The others are layers of their own.
OWN_LAYERS = {"duo_llm": duo_llm, "versatile": versatile}
ROUTERS = {
    "token_choice": token_choice,
    "expert_choice": expert_choice,
    "top_p": top_p,
    "dynamoe": dynamoe,
    "remoe": remoe,
    "blockffn": blockffn,
    "adamoe": adamoe,
    "longcat": longcat,
    "acm": acm,
    "moe_pp": moe_pp,
}
