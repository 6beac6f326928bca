"""What is a path on this machine, and what is an address of another."""

from pathlib import Path

import pytest

from adaptive.errors import UserError
from adaptive.paths import is_address, local_path


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("a/b", "a/b"),
        ("/a b,c", "/a b,c"),
        ("file:///a/b", "/a/b"),
        ("file:/a/b", "/a/b"),
        ("FILE://localhost/a%20b", "/a b"),
        ("./gs://bucket", "gs:/bucket"),
        ("C:/texts", "C:/texts"),
        ("run:1/x", "run:1/x"),
        ("repo/name:config", "repo/name:config"),
        ("texts/**/*.txt", "texts/**/*.txt"),
        ("~/x", str(Path.home() / "x")),
    ],
)
def test_paths(text, path):
    assert local_path(text, "--workdir") == Path(path)


@pytest.mark.parametrize(
    "text",
    ["gs://bucket/run", "s3://b", "hf://datasets/a/b", "https://host/a.txt", "GS://b", "az+x.y-z://b", "gs://b/*,?"],
)
def test_addresses_are_refused_by_name(text):
    assert is_address(text)
    with pytest.raises(UserError, match=r"^--workdir: .* is an address, and only paths on this machine work"):
        local_path(text, "--workdir")


@pytest.mark.parametrize("text", ["file://host/a", "file://a"])
def test_files_of_another_machine_are_refused(text):
    with pytest.raises(UserError, match="another machine; a file of this one is file:///path"):
        local_path(text, "data.paths")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a\0b", "it holds a zero byte"),
        ("", "it is empty"),
        ("a/" + "x" * 256, "it is too long"),
        ("a/" * 2048, "it is too long"),
        ("你" * 86, "it is too long"),
        ("a\ud800", "it holds characters that no name can"),
    ],
)
def test_what_is_no_path(text, why):
    with pytest.raises(UserError, match=rf"^data\.paths: .* is no path: {why}$") as caught:
        local_path(text, "data.paths")
    assert len(str(caught.value)) < 200


def test_a_home_that_is_not_known():
    with pytest.raises(UserError, match=r"data\.paths: ~nobody-here/x: the home folder"):
        local_path("~nobody-here/x", "data.paths")
