"""What the benchmark of diffusion decoding says of its measurements."""

import pytest

from adaptive.benchmarks import denoised, diffusion
from adaptive.benchmarks.diffusion import Timed
from adaptive.inference.diffusion.caches import none
from adaptive.inference.diffusion.policies import learned
from adaptive.objectives import Denoising


def test_the_break_even_is_where_a_cache_wins_at_all_longer_rows():
    seconds = {
        (1, 64): (4, 5),
        (1, 128): (8, 5),
        (1, 256): (16, 5),
        (4, 64): (4, 3),
        (4, 128): (5, 6),
        (4, 256): (9, 10),
    }
    found = {at: {"none": Timed(whole, at[1]), "dual": Timed(part, 16)} for at, (whole, part) in seconds.items()}
    assert diffusion.break_even(found, "dual") == ["batch 1: from 128", "batch 4: nowhere"]
    rows = diffusion.table("made up", found)
    assert [str(cell) for cell in rows.columns[3].cells][:2] == ["0.80 (16 positions)", "1.60 (16 positions)"]


@pytest.mark.parametrize("block", [0, 16])
def test_every_way_is_one_that_its_model_can_go(block):
    found = denoised.ways(block, "filter.npz", cached=True)
    assert len({way.name for way in found}) == len(found) and found[0].cache == none.Settings()
    for way in found:
        way.cache.check(way.policy, 1)
        assert way.cache.in_blocks in (None, block > 0)
    assert any(isinstance(way.policy, learned.Settings) for way in found)
    named = [cache.in_blocks for cache in diffusion.ways(Denoising(0, block, False)).values()]
    assert named[0] is None and set(named[1:]) == {block > 0}
