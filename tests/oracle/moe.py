"""Routing of experts by the letter: loops over tokens and experts, float64, no jax.

Nothing here is shared with `adaptive`; every function restates a published rule so that the package can be compared
with it. Sequences are `x[batch][seq]`, a decision is a list of (expert, weight) of every token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

Array = np.ndarray
Pairs = list[list[list[tuple[int, float]]]]
"""pairs[batch][seq] = (expert, weight) in order of choice."""


def softmax(row: Array) -> Array:
    e = np.exp(np.asarray(row, np.float64) - np.max(row))
    return e / e.sum()


def sigmoid(row: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-np.asarray(row, np.float64)))


def normal_cdf(z: float) -> float:
    return 0.5 * (1.0 + math.erf(z / math.sqrt(2.0)))


def ranked(values: Sequence[float], k: int) -> list[int]:
    """The k places of the largest values, largest first; of equal values the earlier place first."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]


def linear_logits(x: Array, weight: Array) -> Array:
    return np.asarray(x, np.float64) @ np.asarray(weight, np.float64)


def cosine_logits(x: Array, projection: Array, experts: Array, temperature: float) -> Array:
    """Tutel's cosine gate; `projection` [width, dims], `experts` [dims, experts], `temperature` a logarithm."""
    out = np.zeros((*x.shape[:2], experts.shape[1]))
    scale = math.exp(min(float(temperature), math.log(100.0)))
    for b in range(x.shape[0]):
        for s in range(x.shape[1]):
            p = np.asarray(x[b, s], np.float64) @ np.asarray(projection, np.float64)
            p = p / np.linalg.norm(p)
            for e in range(experts.shape[1]):
                v = np.asarray(experts[:, e], np.float64)
                out[b, s, e] = scale * float(p @ (v / np.linalg.norm(v)))
    return out


def limit_groups(choice: Array, groups: int, kept: int, by: str) -> list[float]:
    """DeepSeek: only experts of the best groups stay; `by` is "sum of two" (V3) or "max" (V2)."""
    size = len(choice) // groups
    parts = [list(choice[g * size : (g + 1) * size]) for g in range(groups)]
    score = max if by == "max" else lambda part: sum(sorted(part, reverse=True)[:2])
    scores = [score(part) for part in parts]
    allowed = set(ranked(scores, kept))
    return [float(choice[e]) if e // size in allowed else -math.inf for e in range(len(choice))]


def token_choice(
    logits: Array,
    k: int,
    *,
    score: str = "softmax",
    weights: str = "sum",
    scale: float = 1.0,
    bias: Array | None = None,
    groups: int = 1,
    kept: int = 1,
    group_score: str = "sum of two",
    present: Array | None = None,
) -> Pairs:
    """The k best experts of every token.

    `weights`: "sum" divides by the sum of the selected, "none" leaves them, "logits" selects by logits and takes the
    softmax over the selected logits, "logits, undivided" what the softmax over all logits gives the selected.
    """
    pairs: Pairs = []
    for b in range(logits.shape[0]):
        pairs.append([])
        for s in range(logits.shape[1]):
            if present is not None and not present[b, s]:
                pairs[-1].append([])
                continue
            row = logits[b, s]
            gate = np.asarray(row) if weights == "logits" else softmax(row) if score == "softmax" else sigmoid(row)
            choice = np.asarray(row) if weights == "logits, undivided" else gate
            choice = choice if bias is None else choice + np.asarray(bias, np.float64)
            if groups > 1:
                choice = limit_groups(choice, groups, kept, group_score)
            chosen = ranked(list(choice), k)
            taken = [float(gate[e]) for e in chosen]
            if weights == "logits":
                taken = list(softmax(np.asarray(taken)))
            elif weights == "sum":
                total = sum(taken) + (1e-20 if score == "sigmoid" else 0.0)
                taken = [w / total for w in taken]
            pairs[-1].append([(e, w * scale) for e, w in zip(chosen, taken, strict=True)])
    return pairs


# --- capacity and drops -----------------------------------------------------------------------------------------------


def capacity_megatron(tokens: int, k: int, experts: int, factor: float) -> int:
    return math.ceil(tokens * k / experts * factor)


def capacity_maxtext(seq: int, k: int, experts: int, factor: float) -> int:
    return int(max(math.ceil(seq * k / experts) * factor, factor))


def capacity_flaxformer(tokens: int, experts: int, factor: float, minimum: int = 4) -> int:
    return max(round(factor * tokens / experts), minimum)


def drop(
    pairs: Pairs, experts: int, capacity: Callable[[int], int], policy: str, per: str, top1: Array | None = None
) -> Pairs:
    """The pairs that fit. `capacity` maps the real tokens of a group to rows of an expert; weights stay as they are.

    `policy`: token (token-major), choice (choice-major), bpr, weight, position (token-major, the tokens of a batch in
    Megatron's layout [seq, batch]). `per`: sequence or batch.
    `top1` [batch, seq]: the best score of a token before any renormalisation, for bpr.
    """
    places = [(b, s) for b in range(len(pairs)) for s in range(len(pairs[0]))]
    groups = [places] if per == "batch" else [[p for p in places if p[0] == b] for b in range(len(pairs))]
    kept: set[tuple[int, int, int]] = set()
    for group in groups:
        real = [(b, s) for b, s in group if pairs[b][s]]
        if policy == "position":
            real.sort(key=lambda place: (place[1], place[0]))
        room = capacity(len(real))
        claims = [(order, b, s, j) for order, (b, s) in enumerate(real) for j in range(len(pairs[b][s]))]
        if policy in ("token", "position"):
            claims.sort(key=lambda c: (c[0], c[3]))
        elif policy == "choice":
            claims.sort(key=lambda c: (c[3], c[0]))
        elif policy == "bpr":
            claims.sort(key=lambda c: (c[3], -top1[c[1], c[2]], c[0]))
        elif policy == "weight":
            claims.sort(key=lambda c: (-pairs[c[1]][c[2]][c[3]][1], c[0]))
        else:
            raise ValueError(policy)
        count = [0] * experts
        for _, b, s, j in claims:
            e = pairs[b][s][j][0]
            if count[e] < room:
                kept.add((b, s, j))
            count[e] += 1
    return [
        [[pair for j, pair in enumerate(pairs[b][s]) if (b, s, j) in kept] for s in range(len(pairs[0]))]
        for b in range(len(pairs))
    ]


# --- experts ----------------------------------------------------------------------------------------------------------


def feed_forward(x: Array, gate: Array, up: Array, down: Array) -> Array:
    a = x @ gate
    return ((a * sigmoid(a)) * (x @ up)) @ down


def combine(x: Array, pairs: Pairs, gate: Array, up: Array, down: Array) -> Array:
    x, gate, up, down = (np.asarray(a, np.float64) for a in (x, gate, up, down))
    y = np.zeros_like(x)
    for b in range(x.shape[0]):
        for s in range(x.shape[1]):
            for e, w in pairs[b][s]:
                y[b, s] += w * feed_forward(x[b, s], gate[e], up[e], down[e])
    return y


def dense_weights(pairs: Pairs, experts: int) -> Array:
    """f64[batch, seq, experts]: the weight of every pair, 0 elsewhere."""
    out = np.zeros((len(pairs), len(pairs[0]), experts))
    for b, row in enumerate(pairs):
        for s, token in enumerate(row):
            for e, w in token:
                out[b, s, e] += w
    return out


def dense_mask(pairs: Pairs, experts: int) -> Array:
    out = np.zeros((len(pairs), len(pairs[0]), experts), bool)
    for b, row in enumerate(pairs):
        for s, token in enumerate(row):
            for e, _ in token:
                out[b, s, e] = True
    return out


# --- losses -----------------------------------------------------------------------------------------------------------


def real_tokens(logits: Array, present: Array | None) -> list[tuple[int, int]]:
    return [(b, s) for b in range(logits.shape[0]) for s in range(logits.shape[1]) if present is None or present[b, s]]


def _means(logits: Array, pairs: Pairs, places: Iterable[tuple[int, int]], first: bool = False, score: str = "softmax"):
    """(P_e, n_e, tokens) over the tokens at `places`."""
    experts = logits.shape[-1]
    p, n, tokens = np.zeros(experts), np.zeros(experts), 0
    for b, s in places:
        tokens += 1
        if score == "softmax":
            p += softmax(logits[b, s])
        else:
            p += sigmoid(logits[b, s]) / sigmoid(logits[b, s]).sum()
        for e, _ in pairs[b][s][:1] if first else pairs[b][s]:
            n[e] += 1
    return p / tokens, n, tokens


def switch_loss(logits: Array, pairs: Pairs, k: int, present: Array | None = None) -> float:
    p, n, tokens = _means(logits, pairs, real_tokens(logits, present))
    return len(n) * sum(p[e] * n[e] / (tokens * k) for e in range(len(n)))


def gshard_loss(logits: Array, pairs: Pairs, present: Array | None = None) -> float:
    p, n, tokens = _means(logits, pairs, real_tokens(logits, present), first=True)
    return len(n) * sum(p[e] * n[e] / tokens for e in range(len(n)))


def hf_loss(layers: list[tuple[Array, Pairs]], present: Array | None = None) -> float:
    """`load_balancing_loss_func`: the tokens of all layers in one list before the means."""
    p, n, tokens = 0.0, 0.0, 0
    for logits, pairs in layers:
        p_layer, n_layer, count = _means(logits, pairs, real_tokens(logits, present))
        p, n, tokens = p + p_layer * count, n + n_layer, tokens + count
    return len(n) * sum(p[e] / tokens * n[e] / tokens for e in range(len(n)))


def flaxformer_loss(logits: Array, pairs: Pairs, present: Array | None = None, group: str = "sequence") -> float:
    """experts^2 times the mean over groups and experts of (share of tokens that chose it) (mean probability)."""
    values = []
    for places in groups_of(*logits.shape[:2], group):
        real = [q for q in real_tokens(logits, present) if q in places]
        p, n, tokens = _means(logits, pairs, real)
        values.append([p[e] * n[e] / tokens for e in range(len(n))])
    return float(len(values[0]) ** 2 * np.mean(values))


def maxtext_loss(logits: Array, pairs: Pairs, present: Array | None = None) -> float:
    values = []
    for b in range(logits.shape[0]):
        p, n, tokens = _means(logits, pairs, [q for q in real_tokens(logits, present) if q[0] == b])
        values.append(len(n) ** 2 * np.mean([p[e] * n[e] / tokens for e in range(len(n))]))
    return float(np.mean(values))


def sequence_loss(logits: Array, pairs: Pairs, k: int, present: Array | None = None, score: str = "softmax") -> float:
    values = []
    for b in range(logits.shape[0]):
        p, n, tokens = _means(logits, pairs, [q for q in real_tokens(logits, present) if q[0] == b], score=score)
        values.append(sum(n[e] * len(n) / (tokens * k) * p[e] for e in range(len(n))))
    return float(np.mean(values))


def z_loss(logits: Array, present: Array | None = None) -> float:
    values = [math.log(np.exp(logits[b, s]).sum()) ** 2 for b, s in real_tokens(logits, present)]
    return float(np.mean(values))


def tutel_second_loss(logits: Array, k: int, noise: float, present: Array | None = None, of: str = "scores") -> float:
    """Half the squared variations of importance and load, noise drawn as zero; `of` the scores (Tutel) or logits."""
    experts = logits.shape[-1]
    importance, load = np.zeros(experts), np.zeros(experts)
    for b, s in real_tokens(logits, present):
        row = logits[b, s]
        threshold = sorted(row, reverse=True)[k - 1]
        values = softmax(row) if of == "scores" else row
        importance += softmax(row)
        for e in range(experts):
            load[e] += normal_cdf((values[e] - threshold) / (noise / experts))

    def squared_variation(v: Array) -> float:
        return float(np.var(v, ddof=1) / (np.mean(v) ** 2 + 1e-10))

    return 0.5 * (squared_variation(importance) + squared_variation(load))


def bias_update(bias: Array, counts: Array, rate: float) -> Array:
    mean = np.mean(counts)
    return np.asarray([b + rate * np.sign(mean - n) for b, n in zip(bias, counts, strict=True)])


# --- expert choice ----------------------------------------------------------------------------------------------------


def rows_ecdlm(tokens: int, k: float, experts: int) -> int:
    return max(int(tokens * k // experts), 1)


def rows_zhou(tokens: int, k: float, experts: int) -> int:
    return max(int(tokens * k / experts), 1)


def groups_of(batch: int, seq: int, group: str, chunk: int = 0) -> list[list[tuple[int, int]]]:
    if group == "batch":
        return [[(b, s) for b in range(batch) for s in range(seq)]]
    if group == "position":
        return [[(b, s) for b in range(batch)] for s in range(seq)]
    if group == "chunk":
        return [[(b, s) for s in range(c, c + chunk)] for b in range(batch) for c in range(0, seq, chunk)]
    return [[(b, s) for s in range(seq)] for b in range(batch)]


def expert_choice(
    logits: Array,
    rows: Callable[[int, int], int],
    *,
    weights: str = "softmax over pickers",
    scale: float = 1.0,
    group: str = "sequence",
    chunk: int = 0,
    present: Array | None = None,
    scales: Sequence[float] | None = None,
) -> Pairs:
    """Every expert takes its best tokens of a group.

    `rows(real, batch)`: tokens of an expert, from the real tokens of the group and the sequence it belongs to.
    `weights`: "softmax over pickers" and "sigmoid" (EC-DLM), "probability" (Zhou et al.: selection by them as well).
    `scales`: factor of a token by how many experts picked it.
    """
    batch, seq, experts = logits.shape
    pickers: list[list[list[int]]] = [[[] for _ in range(seq)] for _ in range(batch)]
    for places in groups_of(batch, seq, group, chunk):
        real = [(b, s) for b, s in places if present is None or present[b, s]]
        if not real:
            continue
        count = min(rows(len(real), real[0][0]), len(real))
        for e in range(experts):
            if weights == "probability":
                scores = [float(softmax(logits[b, s])[e]) for b, s in real]
            else:
                scores = [float(logits[b, s, e]) for b, s in real]
            for i in ranked(scores, count):
                pickers[real[i][0]][real[i][1]].append(e)
    return weigh(logits, pickers, weights, scale, scales)


def weigh(
    logits: Array,
    pickers: list[list[list[int]]],
    weights: str,
    scale: float = 1.0,
    scales: Sequence[float] | None = None,
) -> Pairs:
    pairs: Pairs = []
    for b in range(logits.shape[0]):
        pairs.append([])
        for s in range(logits.shape[1]):
            row, who = logits[b, s], pickers[b][s]
            if not who:
                values = []
            elif weights == "softmax over pickers":
                values = list(softmax(row[who]))
            elif weights == "sigmoid":
                values = list(sigmoid(row[who]) / (sigmoid(row[who]).sum() + 1e-20))
            else:
                values = [softmax(row)[e] * scale for e in who]
            factor = 1.0 if scales is None else scales[len(who)]
            pairs[-1].append([(e, v * factor) for e, v in zip(who, values, strict=True)])
    return pairs


def threshold_choice(logits: Array, thresholds: Array, weights: str, scale: float = 1.0) -> Pairs:
    """A token is taken by every expert whose score of it exceeds that expert's threshold."""
    pickers: list[list[list[int]]] = []
    for b in range(logits.shape[0]):
        pickers.append([])
        for s in range(logits.shape[1]):
            scores = softmax(logits[b, s]) if weights == "probability" else logits[b, s]
            pickers[-1].append([e for e in range(logits.shape[2]) if scores[e] > thresholds[e]])
    return weigh(logits, pickers, weights, scale)


def popularity_loss(logits: Array, pairs: Pairs, k: float, group: str = "sequence") -> float:
    """EC-DLM: sum over tokens of [sum over experts of softmax over tokens] pickers / (experts k), mean of groups."""
    batch, seq, experts = logits.shape
    values = []
    for places in groups_of(batch, seq, group):
        columns = [softmax(np.asarray([logits[b, s, e] for b, s in places])) for e in range(experts)]
        value = 0.0
        for i, (b, s) in enumerate(places):
            value += sum(column[i] for column in columns) * len(pairs[b][s]) / (experts * k)
        values.append(value)
    return float(np.mean(values))


def lowest_selected(logits: Array, pairs: Pairs, weights: str, group: str = "sequence") -> Array:
    """f64[experts]: the smallest score an expert took, mean over the groups."""
    batch, seq, experts = logits.shape
    per_group = []
    for places in groups_of(batch, seq, group):
        lows = []
        for e in range(experts):
            taken = [
                softmax(logits[b, s])[e] if weights == "probability" else logits[b, s, e]
                for b, s in places
                if any(e == other for other, _ in pairs[b][s])
            ]
            lows.append(min(taken))
        per_group.append(lows)
    return np.mean(per_group, axis=0)


def scale_by_pickers(experts: int, shared: float, samples: int = 10_000, seed: int = 42) -> Array:
    """f64[experts + 1]: the factor of a token by its experts, by plain simulation."""
    rng = np.random.default_rng(seed)
    out = np.zeros(experts + 1)
    out[0] = samples
    for _ in range(samples):
        p = softmax(rng.standard_normal(experts))
        for n in range(1, experts + 1):
            w = p[:n] / p[:n].sum()
            out[n] += math.sqrt(shared) / math.sqrt(float((w**2).sum()))
    return out / samples


def scale_of_top(experts: int, k: int, shared: float, samples: int = 10_000, seed: int = 42) -> float:
    """The one factor of token choice: the weights are the k largest of the softmax, renormalised."""
    rng = np.random.default_rng(seed)
    total = 0.0
    for _ in range(samples):
        w = np.sort(softmax(rng.standard_normal(experts)))[::-1][:k]
        w = w / w.sum()
        total += math.sqrt(shared) / math.sqrt(float((w**2).sum()))
    return total / samples
