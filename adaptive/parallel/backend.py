"""The platform that jax computes on: what is missing is told in a line."""

import os

from adaptive.errors import UserError


def find_devices() -> None:
    """Lets jax look for its devices. Raises UserError, in one line, where it finds none to use."""
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # an assertion where JAX_PLATFORMS=cuda and there is no GPU
        named = os.environ.get("JAX_PLATFORMS")
        why = str(error).partition("\n")[0].partition(" (set JAX_PLATFORMS")[0].removeprefix("Unable to initialize ")
        why = why.rstrip(".") or "there is no such device"
        if named:
            raise UserError(
                f"JAX_PLATFORMS={named} does not work here: {why}. Unset it to take what there is, or set it to cpu"
            ) from None
        raise UserError(f"jax cannot use the devices here: {why}. To keep to the CPU: JAX_PLATFORMS=cpu") from None
