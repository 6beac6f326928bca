"""Where caches are: in the user's own folder, and for users without one among the temporary files."""

import os
import tempfile

import pytest

from adaptive.caches import cache_folder
from adaptive.data.files import cache_dir
from adaptive.errors import UserError
from adaptive.interop.files import read_tensors
from adaptive.training.tracking.weights_and_biases import key_present


@pytest.fixture(autouse=True)
def no_home(tmp_path, monkeypatch):
    """A user whose home folder cannot be made, and an empty temporary folder."""
    (tmp_path / "file").touch()
    (tmp_path / "temporary").mkdir()
    for name in ("XDG_CACHE_HOME", "ADAPTIVE_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "file" / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path


def test_a_home_folder_is_used(no_home, monkeypatch):
    monkeypatch.setenv("HOME", str(no_home))
    assert cache_folder() == no_home / ".cache" / "adaptive"
    monkeypatch.setenv("XDG_CACHE_HOME", str(no_home / "caches"))
    assert cache_folder() == cache_dir() == no_home / "caches" / "adaptive"
    monkeypatch.setenv("ADAPTIVE_CACHE", str(no_home / "ours"))
    assert cache_dir() == no_home / "ours" and cache_dir("~/tokens") == no_home / "tokens"


def test_a_user_without_a_home_has_a_temporary_folder(no_home, monkeypatch):
    folder = cache_folder()
    assert folder == no_home / "temporary" / f"adaptive-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert cache_dir() == folder

    monkeypatch.delenv("HOME")
    import pwd

    def unknown(uid: int):
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)  # as in a container that runs with a number of its own
    assert cache_folder() == folder
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert not key_present()
    with pytest.raises(UserError, match="the home folder that ~ stands for is not known"):
        read_tensors("~/weights.safetensors")


def test_a_temporary_folder_that_others_may_change_is_not_used(no_home):
    folder = cache_folder()
    folder.chmod(0o777)
    with pytest.raises(UserError, match=r"ADAPTIVE_CACHE.*data\.cache_dir"):
        cache_folder()
    folder.rmdir()
    folder.symlink_to(no_home)
    with pytest.raises(UserError, match="ADAPTIVE_CACHE"):
        cache_folder()


def test_without_any_place_the_variables_are_named(no_home, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(no_home / "file"))
    with pytest.raises(UserError, match=r"ADAPTIVE_CACHE.*JAX_COMPILATION_CACHE_DIR.*data\.cache_dir"):
        cache_folder()
