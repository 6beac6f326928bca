"""Parameters by patterns of their paths."""

import pytest
from flax import nnx

from adaptive.errors import RecipeError
from adaptive.optim.named import chosen

PARAMS = nnx.State({"head": 1, "body": {"core": {"q": 2, "k": 3}, "norm": 4}})


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (("head",), {"head"}),
        (("body",), {"body/core/q", "body/core/k", "body/norm"}),
        (("body/*/q", "body/norm"), {"body/core/q", "body/norm"}),
        (("*",), {"head", "body/core/q", "body/core/k", "body/norm"}),
        ((), set()),
    ],
)
def test_a_pattern_is_a_path_or_what_paths_begin_with(patterns, names):
    flags = nnx.to_flat_state(chosen(PARAMS, patterns, "train.frozen"))
    assert {"/".join(path) for path, flag in flags if flag} == names


def test_a_pattern_of_nothing_is_refused():
    with pytest.raises(RecipeError, match=r"train\.frozen=body/cor: no parameter is called so; nearest: body/core/"):
        chosen(PARAMS, ("head", "body/cor"), "train.frozen")
