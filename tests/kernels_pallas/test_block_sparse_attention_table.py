"""Tables of key blocks: from maps and choices and back, what finds no place, and turned round."""

import numpy as np
import pytest

from kernels_pallas.block_sparse_attention import from_choices, from_map, to_map, transposed

pytestmark = pytest.mark.compiles


def random_map(*shape, share=0.4, seed=0):
    visited = np.random.default_rng(seed).random(shape) < share
    visited[..., 0, :] = False  # a list without entries
    return visited


@pytest.mark.parametrize("slots", [7, 9])  # as many as there are key blocks, and more
def test_a_table_holds_the_map_it_is_made_from(slots):
    visited = random_map(2, 3, 5, 7)
    (blocks, counts), dropped = from_map(visited, slots)
    assert blocks.shape == (2, 3, 5, slots) and not dropped.any()
    np.testing.assert_array_equal(counts, visited.sum(-1))
    np.testing.assert_array_equal(to_map(blocks, counts, 7), visited)
    for listed, count, of in zip(blocks.reshape(-1, slots), counts.reshape(-1), visited.reshape(-1, 7), strict=True):
        expected = np.flatnonzero(of)
        np.testing.assert_array_equal(listed[:count], expected)
        np.testing.assert_array_equal(listed[count:], expected[-1] if count else 0)


def test_what_finds_no_place_is_the_lowest_and_is_counted():
    visited = random_map(4, 6, 8, share=0.7)
    scores = np.random.default_rng(1).random(visited.shape, np.float32)
    table, dropped = from_map(visited, 3, scores)
    kept = np.asarray(to_map(*table, 8))
    assert not (kept & ~visited).any()
    np.testing.assert_array_equal(kept.sum(-1), np.minimum(visited.sum(-1), 3))
    np.testing.assert_array_equal(dropped, visited.sum(-1) - kept.sum(-1))
    assert dropped.any()
    least = np.where(kept, scores, np.inf).min(-1)
    assert (np.where(visited & ~kept, scores, -np.inf).max(-1) < least).all()
    last = np.asarray(to_map(*from_map(visited, 1)[0], 8))  # without scores: the last one
    np.testing.assert_array_equal(last, visited & (np.cumsum(visited[..., ::-1], -1)[..., ::-1] == 1))


def test_visits_key_block_by_key_block():
    visited = random_map(2, 5, 7)
    visited[1] = False
    visited[0, :, 2] = [0, 1, 1, 1, 1]
    visited[0, :, 3] = False  # a key block that nobody visits
    table, _ = from_map(visited, 6)
    keys, pairs, first = (np.asarray(x) for x in transposed(*table, 7))
    assert keys.shape == pairs.shape == (2, 30) and first.shape == (2, 8)
    for row in range(2):
        found = [[] for _ in range(7)]
        for block in range(7):
            for pair in pairs[row, first[row, block] : first[row, block + 1]]:
                query_block, slot = divmod(pair, 6)
                assert table.blocks[row, query_block, slot] == block and slot < table.counts[row, query_block]
                found[block].append(query_block)
        assert found == [list(np.flatnonzero(visited[row, :, block])) for block in range(7)]
        total = first[row, -1]
        assert total == visited[row].sum()
        np.testing.assert_array_equal(keys[row, :total], np.repeat(np.arange(7), np.diff(first[row])))
        assert (keys[row, total:] == (keys[row, total - 1] if total else 0)).all()  # nothing new is fetched
    # Turned round twice, it is the table again.
    back, _ = from_map(to_map(*table, 7).swapaxes(-1, -2), 5)
    np.testing.assert_array_equal(to_map(*back, 5).swapaxes(-1, -2), visited)


def test_choices_of_queries_become_a_union_and_bits():
    rng = np.random.default_rng(2)
    chosen = rng.random((2, 3, 21, 40)) < 0.1
    table, bits, dropped = from_choices(chosen, 4, 40)
    assert bits.shape == (2, 3, 6, 4, 2) and bits.dtype == np.uint32
    np.testing.assert_array_equal(taken(table, bits, 40)[..., :21, :], chosen)
    assert not dropped.any()


def test_of_a_union_too_large_the_own_block_stays():
    rng = np.random.default_rng(3)
    chosen = rng.random((16, 10)) < 0.5
    own = np.arange(16) // 4
    chosen[np.arange(16), own] = True
    table, bits, dropped = from_choices(chosen, 4, 2)
    got = taken(table, bits, 10)
    assert got[np.arange(16), own].all() and not (got & ~chosen).any()
    np.testing.assert_array_equal(dropped, (chosen & ~got).reshape(4, -1).sum(-1))
    assert dropped.any()


def taken(table, bits, key_blocks):
    """bool[..., queries, key blocks]: what the bits say of the slots."""
    blocks, counts, bits = np.asarray(table.blocks), np.asarray(table.counts), np.asarray(bits)
    out = np.zeros((*bits.shape[:-1], key_blocks), bool)
    for at in np.ndindex(bits.shape[:-1]):
        for slot in range(counts[at[:-1]]):
            out[(*at, blocks[at[:-1]][slot])] |= bool(bits[at][slot // 32] >> (slot % 32) & 1)
    return out.reshape(*out.shape[:-3], -1, key_blocks)
