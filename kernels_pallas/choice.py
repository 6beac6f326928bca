"""Which form of an operation a program gets: decided by the machine that it is made for."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
from jax import lax

Kernels = Literal["auto", "reference"]


class Target(NamedTuple):
    """The machine that programs are made for.

    platform  "cpu", "gpu" or "tpu"
    kernels   "reference": XLA's forms everywhere, no kernel
    device    kind of device, by which sizes of blocks are chosen; "": the usual ones
    """

    platform: str
    kernels: Kernels = "auto"
    device: str = ""


_target: contextvars.ContextVar[Target | None] = contextvars.ContextVar("target", default=None)


@contextlib.contextmanager
def target(platform: str, kernels: Kernels = "auto", device: str = "") -> Iterator[None]:
    """Within it only the forms for `platform` are traced; outside, all are and the compiler's target chooses."""
    token = _target.set(Target(platform, kernels, device))
    try:
        yield
    finally:
        _target.reset(token)


def here(kernels: Kernels = "auto") -> contextlib.AbstractContextManager[None]:
    """`target` for this process's own devices."""
    device = jax.devices()[0]
    return target(device.platform, kernels, device.device_kind)


def active_target() -> Target | None:
    return _target.get()


def platform() -> str:
    """What programs are made for: the active target's platform, or else that of this process's own devices."""
    current = _target.get()
    return jax.default_backend() if current is None else current.platform


def by_platform(*args: Any, tpu: Callable[..., Any], cuda: Callable[..., Any], default: Callable[..., Any]) -> Any:
    """`lax.platform_dependent`, or the one form that the active target needs."""
    current = _target.get()
    if current is None:
        return lax.platform_dependent(*args, tpu=tpu, cuda=cuda, default=default)
    if current.kernels == "reference":
        return default(*args)
    return {"tpu": tpu, "gpu": cuda}.get(current.platform, default)(*args)
