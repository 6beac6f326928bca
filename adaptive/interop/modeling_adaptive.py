"""Models of `adaptive` in PyTorch, for `transformers` with trust_remote_code=True; it needs
`layers_adaptive.py` and `routers_adaptive.py` beside it and nothing of adaptive.

config.json says all: `adaptive` is the tree of the model's settings, `layout` which tensors of the checkpoint each
parameter is made of, and `shapes` what it looks like. Routers decide as in generation, each token from its past alone
(`selection="threshold"` in adaptive). There is no cache of keys and values: every token is computed again at each step.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .layers_adaptive import Weights, Where, block, norm, stack


class AdaptiveConfig(PretrainedConfig):
    """The settings tree under `adaptive`, and where each parameter lies."""

    model_type = "adaptive"

    def __init__(self, adaptive=None, layout=None, shapes=None, per_pass=(), **options):
        self.adaptive, self.layout, self.shapes = adaptive or {}, layout or {}, shapes or {}
        self.per_pass = list(per_pass)
        self.hidden_size = self.adaptive.get("width", 0)
        self.num_hidden_layers = 0
        options.setdefault("tie_word_embeddings", False)  # a tied head is no tensor of its own here
        super().__init__(**options)


class AdaptiveForCausalLM(PreTrainedModel, GenerationMixin):
    """Tokens to logits of the next ones."""

    config_class = AdaptiveConfig
    main_input_name = "input_ids"
    _no_split_modules = ()

    def __init__(self, config):
        super().__init__(config)
        for name, shape in sorted({(part[0], tuple(part[1])) for parts in config.layout.values() for part in parts}):
            *above, last = name.split(".")
            module = self
            for key in above:
                if key not in module._modules:
                    module.add_module(key, nn.Module())
                module = module._modules[key]
            module.register_parameter(last, nn.Parameter(torch.zeros(shape)))
        self.post_init()

    def _init_weights(self, module):
        """Parameters come from a checkpoint."""

    def get_input_embeddings(self):
        return None

    def weights(self):
        """Every parameter by its path in adaptive, as it is there."""
        named, found = dict(self.named_parameters()), {}
        for path, parts in self.config.layout.items():
            pieces = []
            for name, _, transposed, rows, axis, offset in parts:
                value = named[name] if rows is None else named[name].narrow(axis, rows[0], rows[1] - rows[0])
                value = value.permute(*range(value.ndim - 1, -1, -1)) if transposed else value
                pieces.append(value + offset if offset else value)
            whole = torch.stack(pieces) if len(pieces) > 1 else pieces[0]
            found[path] = whole.reshape(self.config.shapes[path])
        return found

    def forward(self, input_ids, attention_mask=None, labels=None, return_dict=None, **ignored):
        """input_ids i64[rows, n]; attention_mask 1 where a token is; labels: -100 is left out."""
        s, w = self.config.adaptive, Weights(self.weights(), set(self.config.per_pass))
        there = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        place = (there.long().cumsum(1) - 1).clamp(min=0)
        x = w["embedding"][input_ids] * s["embedding_scale"]
        if s["positions"]:
            x = x + w["positions"][place]
        x = body(w.below("body"), s["body"], x, Where(place, there), s["norm_eps"], input_ids)
        logits = (x @ w["embedding" if s["tie_embeddings"] else "head"].T).float()
        if s["logit_soft_cap"]:
            logits = s["logit_soft_cap"] * torch.tanh(logits / s["logit_soft_cap"])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **ignored):
        return {"input_ids": input_ids, "attention_mask": attention_mask}


# Bodies


def body(w, s, x, where, eps, tokens=None):
    if s["kind"] == "hnet":
        return hnet(w, s, x, where, eps, tokens)
    if s["kind"] == "plain":
        x, _ = stack(w.below("stack"), s["stack"], x, where, eps)
        return norm(w.below("stack"), "norm", x, eps)
    if s["prelude"] is not None:
        x, _ = stack(w.below("prelude"), s["prelude"], x, where, eps)
    if s["order"] == "sequence" and s["recursions"] > 1:
        x = in_place(w.below("core"), s, x, where, eps)
    else:
        x = DEPTHS[s["depth"]["kind"]](w.below("depth"), s, x, where, Core(w.below("core"), s, eps))
    if s["coda"] is not None:
        x, _ = stack(w.below("coda"), s["coda"], x, where, eps)
    return norm(w, "norm", x, eps)


class Core:
    """One pass of the shared stack, with the policy of its keys and values."""

    def __init__(self, w, s, eps):
        self.w, self.s, self.eps, self.first = w, s, eps, None

    def __call__(self, r, x, where):
        policy = self.s["keys_values"]
        kept = None if policy == "per_recursion" or r == 0 else self.first
        x, after = stack(self.w, self.s["core"], x, where, self.eps, kept, policy == "hybrid", r)
        if r == 0:
            self.first = after
        return x


def in_place(w, s, x, where, eps):
    """Each layer of the core runs as often as there are passes before the next one does."""
    own, below = s["core"]["blocks"][0], w.below("blocks/0")
    for layer in range(s["core"]["repeats"] * own["repeat"]):
        kept = None
        for r in range(s["recursions"]):
            x, after = block(below.at(layer, r), own, x, where, eps, kept, kept is None)
            kept = (kept or after) if s["keys_values"] == "shared" else None
    return x


# Depth


def router(w, name, x, temperature):
    x = x.float() / temperature
    hidden = w.get(f"{name}/hidden")
    if hidden is not None:
        x = F.gelu(x @ hidden.float())
    return x @ w[f"{name}/out"].float()


def scores(logits, s):
    if s["activation"] == "none":
        return logits
    how = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "softmax": lambda a: torch.softmax(a, -1)}
    return how[s["activation"]](logits) * s["alpha"]


def every_pass(w, s, x, where, core):
    for r in range(s["recursions"]):
        x = core(r, x, where)
    return x


def expert_choice(w, s, x, where, core):
    """A token goes on while the router's threshold lets it; the first pass is everyone's."""
    depth, active = s["depth"], where.there
    for r in range(s["recursions"]):
        logits = router(w, f"routers/{r}", x, depth["temperature"])[..., 0]
        decision = logits
        if depth["sampling"] == "aux_router":
            decision = router(w, f"aux_routers/{r}", x, 1.0)[..., 0]
        if r:
            active = active & (decision >= 0)
        gate = scores(logits, depth) if depth["gating"] == "weighted" else torch.ones_like(logits)
        new = core(r, x, where.only(active))
        x = x + ((gate * active)[..., None] * new.float()).to(x.dtype)
    return x


def token_choice(w, s, x, where, core):
    """A token's number of passes is chosen before the first; it leaves with its gated output."""
    depth = s["depth"]
    logits = router(w, "router", x, depth["temperature"])
    every = scores(logits, depth)
    bias = w.get("bias")
    wanted = (every if bias is None else every + bias).argmax(-1)
    gate = every.gather(-1, wanted[..., None]) if depth["gating"] == "weighted" else 1.0
    h = out = x
    for r in range(s["recursions"]):
        active = (wanted >= r) & where.there
        new = core(r, h, where.only(active))
        left = (x.float() + gate * new.float()).to(x.dtype)
        out = torch.where((wanted == r)[..., None], left, out)
        h = torch.where(active[..., None], new, h)
    return out


def mixture_of_depths(w, s, x, where, core):
    """Every so many passes compute those tokens alone that the predictor names."""
    depth = s["depth"]
    for r in range(s["recursions"]):
        if (r + 1) % depth["every"]:
            x = core(r, x, where)
            continue
        group = r // depth["every"]
        logits, decision = ((x.float() @ w[name][group])[..., 0] for name in ("router", "predictor"))
        active = (decision > 0) & where.there
        added = core(r, x, where.only(active)).float() - x.float()
        x = x + ((torch.sigmoid(logits) * active)[..., None] * added).to(x.dtype)
    return x


DEPTHS = {
    "all": every_pass,
    "expert_choice": expert_choice,
    "token_choice": token_choice,
    "mixture_of_depths": mixture_of_depths,
}


# H-Net


def hnet(w, s, x, where, eps, tokens):
    """Each row by itself, as its chunks begin where they do."""
    out = torch.zeros_like(x)
    for row in range(x.shape[0]):
        there = where.there[row]
        if there.any():
            own = None if tokens is None else tokens[row, there]
            out[row, there] = chunked(w, s, x[row, there], eps, own)
    return out


def everywhere(x):
    """Where all of x [1, n, width] is."""
    place = torch.arange(x.shape[1], device=x.device)[None]
    return Where(place, torch.ones_like(place, dtype=torch.bool))


def chunked(w, s, x, eps, tokens):
    """One row [n, width]; tokens i64[n], of the outermost stage alone."""
    where, narrow = everywhere(x[None]), x.shape[-1]
    h, _ = stack(w.below("encoder"), s["encoder"], x[None], where, eps)
    h = norm(w.below("encoder"), "norm", h, eps)
    around = h.float() @ w["residual/weight"] + w["residual/bias"]
    prob, begins = CHUNKERS[s["chunker"]["kind"]](w.below("chunker"), s["chunker"], h[0], tokens)
    places = begins.nonzero()[:, 0]
    chunks = h[0, places]
    if s["merge"] == "sum":
        total = h[0].float().cumsum(0)[places]
        chunks = (total - F.pad(total, (0, 0, 1, 0))[:-1]).to(h.dtype)
    if w.get("pad") is not None:
        chunks = torch.cat([chunks, w["pad"].expand(len(chunks), -1)], -1)
    z = body(w.below("inner"), s["inner"], chunks[None], everywhere(chunks[None]), eps)[0, :, :narrow].float()
    if s["chunker"]["kind"] in ("dynamic", "similarity"):
        z = averaged(z, prob[places].clamp(LEAST, 1 - LEAST))
    chunk = begins.long().cumsum(0) - 1
    read = torch.where((chunk >= 0)[:, None], z[chunk.clamp(min=0)], torch.zeros_like(z[:1]))
    y, _ = stack(w.below("decoder"), s["decoder"], (read[None] + around).to(h.dtype), where, eps)
    return norm(w.below("decoder"), "norm", y, eps)[0]


LEAST = 1e-4  # of a boundary's weight in the moving average


def averaged(z, weights):
    """The moving average f32[n, width] of z."""
    found, value = [], torch.zeros_like(z[0])
    for own, weight in zip(z, weights, strict=True):
        value = weight * own + (1 - weight) * value
        found.append(value)
    return torch.stack(found)


def by_similarity(w, s, h, tokens):
    """(probability f32[n], bool[n]: whether a chunk begins)."""
    unit = lambda a: a * torch.rsqrt(a.pow(2).sum(-1, keepdim=True).clamp(min=1e-24))  # noqa: E731
    before = torch.cat([torch.zeros_like(h[:1]), h[:-1]]).float()
    prob = ((1 - (unit(before @ w["q"]) * unit(h.float() @ w["k"])).sum(-1)) / 2).clamp(0, 1)
    prob[0] = 1.0
    return prob, prob > 0.5 if s["kind"] == "dynamic" else prob >= 0.5


def by_count(w, s, h, tokens):
    begins = torch.arange(len(h), device=h.device) % s.get("length", 1) == 0
    return begins.float(), begins


def by_space(w, s, h, tokens):
    between = lambda low, high: (tokens >= ord(low)) & (tokens <= ord(high))  # noqa: E731
    letter = between("0", "9") | between("A", "Z") | between("a", "z")
    like = ~letter & ((tokens < 128) | (tokens >= 192))
    begins = (like & ~torch.cat([like[:1], like[:-1]])) | (tokens == BEGIN)
    begins[0] = True
    return begins.float(), begins


BEGIN = 254
CHUNKERS = {
    "dynamic": by_similarity,
    "similarity": by_similarity,
    "stride": by_count,
    "none": by_count,
    "space": by_space,
}
