"""The configuration of the released Mixture-of-Recursions code, read as ours."""

from collections.abc import Mapping
from typing import Any

from adaptive.errors import RecipeError
from adaptive.layers import block, stack
from adaptive.layers.feed_forwards import dense
from adaptive.layers.mixers import attention
from adaptive.models import language_model
from adaptive.models.bodies import Body, plain
from adaptive.models.bodies.recursive import KeysValues
from adaptive.models.bodies.recursive import Settings as Recursive
from adaptive.models.depth import Depth, expert_choice, token_choice
from adaptive.models.depth import all as all_tokens

_SHARINGS = ("cycle", "sequence", "middle_cycle", "middle_sequence")
_ROUTERS = ("linear", "mlp", "wide_mlp")
MOST_LAYERS = 10_000  # each is built before any tensor is looked at
# Values of optional llama keys for which the released network is the one built here.
_PLAIN = {"hidden_act": ("silu",), "attention_bias": (False, None), "mlp_bias": (False, None), "rope_scaling": (None,)}


def config_from_official(config: Mapping[str, Any]) -> language_model.Settings:
    """The model that an official configuration describes, as the released code builds it.

    Where the depth does not divide, that code drops layers and numbers the rest anew. `base_depth` it reads only when
    `num_recursion` is 1, which keeps that many layers of a vanilla model; otherwise it follows from the depth. Its
    wide_mlp router is as wide as its mlp. How a shared block was initialised is of no matter here. Raises RecipeError,
    naming the key, for what is missing or unknown or has no counterpart.
    """
    llama = _Section(config, "llama", required=True)
    for key, known in _PLAIN.items():
        if llama.get(key, known[0]) not in known:
            raise RecipeError(f"official config: llama.{key}={llama.get(key)!r} is not supported, only {known[0]!r}")
    ours = language_model.Settings(
        vocab_size=llama.integer("vocab_size"),
        width=llama.integer("hidden_size"),
        body=_body(config, llama),
        tie_embeddings=bool(llama.get("tie_word_embeddings", True)),
        norm_eps=llama.number("rms_norm_eps", 1e-5),
    )
    ours.validate()
    return ours


class _Section:
    """One block of the official configuration; a missing block is switched off."""

    def __init__(self, parent: Mapping[str, Any], name: str, *, required: bool = False, path: str = ""):
        values = parent.get(name)
        if values is None and required:
            raise RecipeError(f"official config: the section {path}{name} is missing")
        if values is not None and not isinstance(values, Mapping):
            raise RecipeError(f"official config: {path}{name} must be a dict of settings, not {values!r}")
        self._values, self._path = values or {}, f"{path}{name}"
        self.enabled = bool(self._values.get("enable", False))

    def get(self, key: str, default: Any = None) -> Any:
        return self._values.get(key, default)

    def section(self, name: str) -> "_Section":
        return _Section(self._values, name, required=True, path=f"{self._path}.")

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._values.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int):
            found = "is missing" if value is None else f"is {value!r}"
            raise RecipeError(f"official config: {self._path}.{key} {found}; it must be an integer")
        return value

    def number(self, key: str, default: float) -> float:
        value = self._values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise RecipeError(f"official config: {self._path}.{key} is {value!r}; it must be a number")
        return float(value)

    def choice(self, key: str, known: tuple[str | None, ...], default: str | None = None) -> str | None:
        value = self._values.get(key, default)
        if value not in known:
            names = ", ".join("null" if k is None else k for k in known)
            raise RecipeError(f"official config: {self._path}.{key}={value!r}; known: {names}")
        return value


def _body(config: Mapping[str, Any], llama: _Section) -> Body:
    recursive, kv, mor = (_Section(config, name) for name in ("recursive", "kv_sharing", "mor"))
    layers = llama.integer("num_hidden_layers")
    if layers > MOST_LAYERS:
        raise RecipeError(f"official config: llama.num_hidden_layers={layers} must be at most {MOST_LAYERS}")
    layers, recursions, sharing = _structure(layers, recursive, kv, mor)
    one = _block(llama)
    if recursions == 1:
        return plain.Settings(stack.Settings((one,), repeats=layers))
    middle = sharing.startswith("middle")
    end = stack.Settings((one,)) if middle else None
    return Recursive(
        prelude=end,
        core=stack.Settings((one,), repeats=(layers - 2 * middle) // recursions),
        coda=end,
        recursions=recursions,
        depth=_depth(config, mor, recursions) if mor.enabled else all_tokens.Settings(),
        shared="all" if recursive.enabled else "none",
        order="sequence" if sharing.endswith("sequence") else "cycle",
        keys_values=_keys_values(kv, mor, sharing),
    )


def _block(llama: _Section) -> block.Settings:
    heads, width = llama.integer("num_attention_heads"), llama.integer("hidden_size")
    attends = attention.Settings(
        heads=heads,
        kv_heads=llama.integer("num_key_value_heads", heads),
        head_dim=llama.integer("head_dim", width // max(heads, 1)),
        rope_theta=llama.number("rope_theta", 10_000.0),
    )
    return block.Settings(attends, dense.Settings(llama.integer("intermediate_size")))


def _structure(layers: int, recursive: _Section, kv: _Section, mor: _Section) -> tuple[int, int, str]:
    """Unrolled layers, recursions and sharing strategy."""
    if mor.enabled and not recursive.enabled:
        raise RecipeError("official config: mor.enable needs recursive.enable to be true")
    shared, name = (recursive, "recursive") if recursive.enabled else (kv, "kv_sharing")
    if not shared.enabled:
        return layers, 1, "middle_cycle"
    sharing, recursions = str(shared.choice("sharing", _SHARINGS)), shared.integer("num_recursion")
    if recursive.get("ln_share", True) is not True and recursive.enabled:
        raise RecipeError(
            "official config: recursive.ln_share=false (norms of their own at every recursion) is not supported; "
            "it must be true"
        )
    if mor.enabled and sharing.endswith("sequence"):
        raise RecipeError(
            f"official config: recursive.sharing={sharing}: routing needs one contiguous block per recursion; use "
            "cycle or middle_cycle"
        )
    if recursions < 1:
        raise RecipeError(f"official config: {name}.num_recursion={recursions} must be at least 1")
    if recursions == 1:
        return _without_recursion(layers, recursive, mor), 1, sharing
    ends = 2 if sharing.startswith("middle") else 0
    inner = layers - ends
    # Layers that do not divide are dropped, of recursive models alone.
    if inner < recursions or (inner % recursions and not recursive.enabled):
        near = sorted({ends + max(1, inner // recursions + more) * recursions for more in (0, 1)})
        raise RecipeError(
            f"official config: {name}.num_recursion={recursions} does not divide the depth: "
            f"llama.num_hidden_layers={layers} with sharing={sharing} must be "
            f"{'first + block * recursions + last' if ends else 'block * recursions'}; nearest: "
            f"{', '.join(map(str, near))}"
        )
    return inner // recursions * recursions + ends, recursions, sharing


def _without_recursion(layers: int, recursive: _Section, mor: _Section) -> int:
    """Layers of a model with `num_recursion` 1."""
    if mor.enabled:
        raise RecipeError("official config: mor.enable needs recursive.num_recursion of at least 2")
    if not recursive.enabled:
        return layers
    base = recursive.integer("base_depth")
    if base < 1 or layers % base:
        raise RecipeError(f"official config: recursive.base_depth={base} must divide llama.num_hidden_layers={layers}")
    return base


def _keys_values(kv: _Section, mor: _Section, sharing: str) -> KeysValues:
    """The released configuration check copies the recursion's sharing over the keys' and values'."""
    if not kv.enabled:
        return "per_recursion"
    if mor.enabled and kv.get("update_cache", False):
        if mor.get("type") != "expert" or sharing != "middle_cycle":
            raise RecipeError(
                "official config: kv_sharing.update_cache is defined for mor.type=expert with "
                "recursive.sharing=middle_cycle only"
            )
        return "hybrid"
    if sharing == "middle_sequence":
        raise RecipeError("official config: kv_sharing is undefined for sharing=middle_sequence; use middle_cycle")
    return "shared"


def _depth(config: Mapping[str, Any], mor: _Section, recursions: int) -> Depth:
    expert = mor.choice("type", ("expert", "token")) == "expert"
    part = mor.section("expert" if expert else "token")
    network = mor.choice("router_type", _ROUTERS, "linear")
    common: dict[str, Any] = {
        "network": "mlp" if network == "wide_mlp" else network,
        "temperature": mor.number("temp", 1.0),
        "random": bool(mor.get("rand_router", False)),
        "z_coefficient": mor.number("z_coeff", 0.001) if mor.get("z_loss", False) else 0.0,
        "gating": part.choice("gating", ("weighted", "additive"), "weighted"),
    }
    if expert:
        warmup = part.get("cap_warmup_step")
        return expert_choice.Settings(
            activation=part.choice("router_func", ("sigmoid", "tanh", None)) or "none",  # type: ignore[arg-type]
            alpha=part.number("alpha", 0.1),
            capacities=_capacities(mor.get("capacity"), recursions),
            sampling=part.choice("sampling", ("aux_loss", "aux_router", None)) or "none",  # type: ignore[arg-type]
            aux_coefficient=part.number("coeff", 0.01),
            capacity_warmup_steps=int((config.get("num_warmup_steps") or 0) if warmup is None else warmup),
            **common,
        )
    activation = part.choice("router_func", ("softmax", "sigmoid", None), "softmax") or "softmax"
    return token_choice.Settings(
        activation=activation,  # type: ignore[arg-type]
        alpha=part.number("alpha", 0.1 if activation == "sigmoid" else 1.0),
        balancing=part.choice("balancing", ("loss", "loss_free", None)) or "none",  # type: ignore[arg-type]
        balance_coefficient=part.number("coeff", 0.01),
        bias_update_rate=part.number("u", 0.001),
        # The released code counts its forward passes from 1 and warms up while the count is below the setting.
        balance_warmup_steps=max(0, part.integer("bal_warmup_step", 0) - 1),
        **common,
    )


def _capacities(value: Any, recursions: int) -> tuple[float, ...]:
    """The fractions of a comma-separated string or a list; null is the default schedule."""
    if value is None:
        return ()
    try:
        found = tuple(float(x) for x in (value.split(",") if isinstance(value, str) else value))
    except (TypeError, ValueError):
        raise RecipeError(
            f"official config: mor.capacity={value!r} must be {recursions} fractions separated by commas"
        ) from None
    if found and len(found) != recursions:
        raise RecipeError(
            f"official config: mor.capacity has {len(found)} fractions for recursive.num_recursion={recursions}"
        )
    return found
