"""Devices and compiled programs of a machine: what is missing is told in a line."""

import warnings

import jax
import pytest

from adaptive.errors import UserError
from adaptive.runs import platform


@pytest.mark.parametrize(
    ("named", "error", "says"),
    [
        (
            "tpu",
            RuntimeError("Unable to initialize backend 'tpu': no libtpu. (set JAX_PLATFORMS='' to choose)\nmore"),
            "JAX_PLATFORMS=tpu does not work here: backend 'tpu': no libtpu. Unset it to take what there is, or set "
            "it to cpu",
        ),
        (
            "cuda",
            AssertionError(),
            "JAX_PLATFORMS=cuda does not work here: there is no such device. Unset it to take what there is, or set it "
            "to cpu",
        ),
        (
            None,
            RuntimeError("Unable to initialize backend 'cuda': the driver is too old"),
            "jax cannot use the devices here: backend 'cuda': the driver is too old. To keep to the CPU: "
            "JAX_PLATFORMS=cpu",
        ),
    ],
)
def test_a_platform_that_is_not_there_is_told_in_a_line(monkeypatch, named, error, says):
    def devices():
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.delenv("JAX_PLATFORMS")
    if named:
        monkeypatch.setenv("JAX_PLATFORMS", named)
    with pytest.raises(UserError) as raised:
        platform.start_backend()
    assert str(raised.value) == says


def test_compiled_programs_lie_in_the_folder_of_caches(monkeypatch, tmp_path):
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "gs://bucket/compiled")
    assert platform.keep_compilations() == "kept in gs://bucket/compiled"  # jax reads and writes there itself
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/dev/null/compiled")
    with warnings.catch_warnings(record=True) as told:
        assert platform.keep_compilations() == "not kept: /dev/null/compiled cannot be written"
        warnings.warn("Error writing persistent compilation cache entry for 'jit_step'", stacklevel=1)
    assert not told
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert platform.keep_compilations() == f"kept in {tmp_path / 'adaptive' / 'compiled'}"
