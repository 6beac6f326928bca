"""Models that settings alone make of parts that never heard of each other. That they learn, generate and give the same
with a cache is asked of their recipes, with all others."""

import pytest
import shapes
from flax import nnx
from hnet_models import split_model

from adaptive.recipe import load

pytestmark = pytest.mark.compiles


def made(name: str):
    return nnx.merge(*split_model(shapes.reduced(load(name).model)))


def test_every_part_of_a_composition_is_there():
    """An H-Net in an H-Net around a MoR of experts that choose."""
    model = made("hnet_hnet_mor_moe_tiny")
    assert list(model.routed()) == [f"inner/inner/{part}/blocks/0/feed_forward" for part in ("prelude", "core", "coda")]
    assert model.selections() == ("topk", "threshold") and not model.refuse_cache() and not model.refuse_generation()


def test_passes_share_mixers_and_have_experts_of_their_own():
    own = made("mor_moe_per_pass_tiny").body.core.blocks[0]
    assert own.mixer.q.shape[:1] == (1,) and own.feed_forward.experts.up.shape[:2] == (3, 1)
    axes = [param.get_metadata()["axes"][0] for param in (own.mixer.q, own.feed_forward.experts.up)]
    assert axes == ["stages", "uses"]
