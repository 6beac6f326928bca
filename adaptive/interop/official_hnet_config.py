"""The configuration of the released H-Net code (configs/*.json, models/config_hnet.py), read as ours and written."""

import difflib
from collections.abc import Mapping
from typing import Any, NamedTuple

from adaptive.errors import RecipeError
from adaptive.interop.official_hnet_layout import Layout, Parts, parse_layout, parts_in, stack_of, text_of
from adaptive.layers import stack
from adaptive.layers.chunkers import dynamic
from adaptive.layers.feed_forwards.dense import Settings as Dense
from adaptive.layers.mixers.attention import Settings as Attention
from adaptive.layers.mixers.mamba2 import Settings as Mamba2
from adaptive.models import language_model
from adaptive.models.bodies import Body, hnet, plain

# Official name and the value where it is left out (None: it may not be).
_TOP: dict[str, Any] = {
    "arch_layout": None, "d_model": None, "d_intermediate": None, "vocab_size": None, "ssm_cfg": {}, "attn_cfg": None,
    "tie_embeddings": False, "ratio_targets": (),
}  # fmt: skip
# Official name -> ours, and the value where it is left out.
_SSM = {
    "chunk_size": ("block", 256), "d_conv": ("d_conv", 4), "d_state": ("d_state", 128), "expand": ("expand", 2),
    "headdim": ("head_dim", 64),
}  # fmt: skip
_ATTENTION = {"num_heads": 0, "rotary_emb_dim": 0, "window_size": -1}  # official name -> the least that it may be
NORM_EPS, ROPE_THETA = 1e-5, 10_000.0  # of the release, which no configuration sets
SWIGLU_MULTIPLE = 128  # feed-forwards are rounded up to it (released code, modules/mlp.py)


class Stage(NamedTuple):
    """One stage of a model: its width and stacks, encoder and decoder or, of the innermost, the only one."""

    width: int
    stacks: tuple[stack.Settings, ...]

    def parts(self) -> Parts:
        return parts_in(self.stacks)


def stages_of(settings: language_model.Settings) -> list[Stage]:
    """The stages of an H-Net that ends in a stack, from the outside in."""
    found, width, body = [], settings.width, settings.body
    while isinstance(body, hnet.Settings):
        found.append(Stage(width, (body.encoder, body.decoder)))
        width, body = body.width_inside(width), body.inner
    assert isinstance(body, plain.Settings)
    return [*found, Stage(width, (body.stack,))]


def config_from_official(config: Mapping[str, Any]) -> language_model.Settings:
    """The model that an official configuration describes, without limits on chunks.

    Beyond the release, ssm_cfg may have `headdim` (64 there), and `ratio_targets` may say what the ratio loss of each
    stage pulls to; without it the paper's: 6 for one stage, 3 for each of several. Raises RecipeError, naming the key,
    for what is missing, unknown or of the wrong type.
    """
    _known(config, _TOP, "")
    layout = parse_layout(config["arch_layout"], where="official config: arch_layout")
    widths = _integers(config["d_model"], layout.stages + 1, "d_model", low=1)
    parts = _parts(config, layout, widths)
    targets = _targets(config.get("ratio_targets") or (), layout.stages)
    body: Body = plain.Settings(stack_of(layout.main, parts[-1]))
    for s in reversed(range(layout.stages)):
        body = hnet.Settings(
            encoder=stack_of(layout.encoders[s], parts[s]),
            chunker=dynamic.Settings(target=targets[s]),
            inner=body,
            inner_width=widths[s + 1],
            decoder=stack_of(layout.decoders[s], parts[s]),
        )
    ours = language_model.Settings(
        vocab_size=_integers([config["vocab_size"]], 1, "vocab_size", low=1)[0],
        width=widths[0],
        body=body,
        tie_embeddings=bool(config.get("tie_embeddings", False)),
        norm_eps=NORM_EPS,
        embedding_std=1.0,
    )
    ours.validate()
    return ours


def config_to_official(settings: language_model.Settings) -> dict[str, Any]:
    """The official configuration of a model that has one (`official_hnet.to_official` refuses others); `headdim` is in
    it only where it is not the release's 64. What a stage has no blocks for is what has no effect there."""
    stages = stages_of(settings)
    parts = [stage.parts() for stage in stages]
    mamba = next((p.mamba for p in parts if p.mamba is not None), Mamba2())
    ssm = {name: [getattr(p.mamba or mamba, ours) for p in parts] for name, (ours, _) in _SSM.items()}
    if set(ssm["headdim"]) == {_SSM["headdim"][1]}:
        del ssm["headdim"]
    attention = [p.attention or Attention(heads=1, rotary_dim=0) for p in parts]
    layout = [text_of(stages[-1].stacks[0])]
    for stage in reversed(stages[:-1]):
        encoder, decoder = map(text_of, stage.stacks)
        layout = [encoder, layout, decoder]  # type: ignore[list-item]
    return {
        "arch_layout": layout,
        "d_model": [stage.width for stage in stages],
        "d_intermediate": [p.feed_forward.hidden if p.feed_forward else 0 for p in parts],
        "vocab_size": settings.vocab_size,
        "ssm_cfg": {name: values[0] if len(set(values)) == 1 else values for name, values in ssm.items()},
        "attn_cfg": {
            "num_heads": [a.heads for a in attention],
            "rotary_emb_dim": [a.rotated for a in attention],
            "window_size": [a.window - 1 for a in attention],  # of the positions to the left alone; -1: all
        },
        "tie_embeddings": settings.tie_embeddings,
    }


def _parts(config: Mapping[str, Any], layout: Layout, widths: tuple[int, ...]) -> list[Parts]:
    """What the blocks of each stage are made of."""
    stages = layout.stages + 1
    ssm, attention = (_section(config, name) for name in ("ssm_cfg", "attn_cfg"))
    _known(ssm, _SSM, "ssm_cfg.")
    _known(attention, _ATTENTION, "attn_cfg.")
    hidden = _integers(config["d_intermediate"], stages, "d_intermediate", low=0)
    attends: dict[str, tuple[int, ...]] = {}
    for name, low in _ATTENTION.items():
        if name not in attention:
            raise RecipeError(f"official config: attn_cfg.{name} is missing")
        attends[name] = _integers(attention[name], stages, f"attn_cfg.{name}", low=low)
    mamba: dict[str, tuple[int, ...]] = {}
    for name, (ours, usual) in _SSM.items():
        value = ssm.get(name, usual)
        listed = value if isinstance(value, list | tuple) else [value]
        found = _integers(listed, stages if len(listed) > 1 else 1, f"ssm_cfg.{name}", low=1)
        mamba[ours] = found if len(found) > 1 else found * stages
    return [
        Parts(
            _attention(layout.letters(s), s, widths[s], *(attends[name][s] for name in _ATTENTION)),
            Mamba2(**{name: values[s] for name, values in mamba.items()}),
            _feed_forward(layout.letters(s), s, hidden[s]),
        )
        for s in range(stages)
    ]


def _attention(letters: str, stage: int, width: int, heads: int, rotary_dim: int, window: int) -> Attention | None:
    """The attention of a stage with these letters; window: positions to the left that are seen, -1: all."""
    letter = next((letter for letter in letters if letter in "tT"), "")
    if not letter:  # stages without attention have been seen with zeros here
        return None
    if heads < 1 or width % heads:
        raise RecipeError(
            f"official config: arch_layout at stage {stage}, letter {letter}: width {width} is not a multiple of the "
            f"{heads} attention heads"
        )
    return Attention(
        heads=heads, head_dim=width // heads, rotary_dim=rotary_dim, rope_theta=ROPE_THETA, window=window + 1
    )


def _feed_forward(letters: str, stage: int, hidden: int) -> Dense | None:
    letter = next((letter for letter in letters if letter.isupper()), "")
    if not letter:
        return None
    if not hidden:
        raise RecipeError(
            f"official config: arch_layout at stage {stage}, letter {letter}: it has a feed-forward, so d_intermediate "
            "must be above 0 there"
        )
    return Dense(-(-hidden // SWIGLU_MULTIPLE) * SWIGLU_MULTIPLE)


def _known(values: Mapping[str, Any], names: Mapping[str, Any], path: str) -> None:
    if unknown := next((key for key in values if key not in names), None):
        near = difflib.get_close_matches(str(unknown), names, n=1)
        raise RecipeError(
            f"official config: {path}{unknown} is unknown{f'; did you mean {near[0]}?' if near else ''} "
            f"Known: {', '.join(names)}"
        )
    if missing := next((key for key, usual in names.items() if usual is None and key not in values), None):
        raise RecipeError(f"official config: {path}{missing} is missing")


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    values = config.get(name, {})
    if not isinstance(values, Mapping):
        raise RecipeError(f"official config: {name} must be a dict of settings, not {values!r}")
    return values


def _integers(values: Any, count: int, name: str, *, low: int) -> tuple[int, ...]:
    if not isinstance(values, list | tuple) or len(values) != count:
        raise RecipeError(
            f"official config: {name}={values!r} must be a list of {count} integers, one for each stage of arch_layout"
        )
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise RecipeError(f"official config: {name} has {value!r}; it must be integers of at least {low}")
    return tuple(values)


def _targets(values: Any, stages: int) -> tuple[float, ...]:
    if not values:
        return (6.0,) if stages <= 1 else (3.0,) * stages
    try:
        found = tuple(map(float, values))
    except (TypeError, ValueError):
        found = ()
    if len(found) != stages:
        raise RecipeError(
            f"official config: ratio_targets={values!r} must be a list of {stages} numbers, one per chunking stage"
        )
    return found
