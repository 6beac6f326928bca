import itertools

import numpy as np
import pytest

from adaptive.data.synthetic import ASK, FIRST_SYMBOL, OPEN, TASKS, SyntheticRows
from adaptive.errors import DataError

SEQ = 200


def rows(name: str, seed: int = 0, held_out: bool = False, vocab_size: int = 320) -> SyntheticRows:
    return SyntheticRows(name, seq_len=SEQ, vocab_size=vocab_size, seed=seed, held_out=held_out)


def episodes(name: str, index: int) -> list[list[tuple[int, int]]]:
    """Whole episodes of a row as (token, depth) pairs; each begins with the token that opens it."""
    tokens, depth = rows(name).sample(index)
    pairs = list(zip(tokens.tolist(), [0, *depth.tolist()], strict=True))
    opens = [i for i, (token, _) in enumerate(pairs) if token == OPEN]
    if name == "addition":
        opens = opens[::2]  # the second one separates the numbers
    return [pairs[a:b] for a, b in itertools.pairwise(opens)]


@pytest.mark.parametrize("name", TASKS)
def test_rows_are_functions_of_seed_and_index(name):
    first, again = rows(name)[3], rows(name)[3]
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert all(field.shape == (SEQ,) for field in first[:5])
    np.testing.assert_array_equal(first.tokens[1:], first.targets[:-1])
    others = [rows(name)[4], rows(name, seed=1)[3], rows(name, held_out=True)[3]]
    assert all((other.tokens != first.tokens).any() for other in others)
    assert first.mask.sum() > 0


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("vocab_size", [16, 320])
def test_ids_fit_the_vocabulary(name, vocab_size):
    for i in range(5):
        row = rows(name, vocab_size=vocab_size)[i]
        assert row.targets.min() >= 0 and row.targets.max() < vocab_size


def test_uniform_is_uniform():
    tokens = np.concatenate([rows("uniform")[i].tokens for i in range(100)])
    counts = np.bincount(tokens, minlength=320)
    assert counts.min() > 0 and abs(tokens.mean() - 159.5) < 3
    assert rows("uniform")[0].mask.all()


@pytest.mark.parametrize(("name", "step"), [("copy", 1), ("reverse", -1)])
def test_words_are_repeated(name, step):
    for index in range(5):
        for episode in episodes(name, index):
            tokens = [token for token, _ in episode]
            ask = tokens.index(ASK)
            assert tokens[ask + 1 :] == tokens[1:ask][::step]
            assert [depth > 0 for _, depth in episode] == [False] * (ask + 1) + [True] * (ask - 1)


def test_recall_answers_with_the_value_of_the_key():
    for index in range(5):
        for episode in episodes("recall", index):
            tokens = [token for token, _ in episode]
            ask = tokens.index(ASK)
            pairs = dict(zip(tokens[1:ask:2], tokens[2:ask:2], strict=True))
            assert pairs[tokens[ask + 1]] == tokens[ask + 2] and episode[-1][1] == 1


def test_chase_follows_as_many_pointers_as_its_depth_says():
    depths = set()
    for index in range(10):
        for episode in episodes("chase", index):
            tokens = [token for token, _ in episode]
            ask = tokens.index(ASK)
            step = dict(zip(tokens[1:ask:2], tokens[2:ask:2], strict=True))
            at, depth = tokens[ask + 1], episode[-1][1]
            assert tokens[ask + 2 : -1] == [ASK] * (depth - 1)
            for _ in range(depth):
                at = step[at]
            assert at == tokens[-1]
            depths.add(depth)
    assert depths == {1, 2, 3, 4}


def test_addition_is_right_and_its_depth_follows_the_carries():
    for index in range(10):
        for episode in episodes("addition", index):
            tokens = [token for token, _ in episode]
            ask = tokens.index(ASK)
            middle = tokens.index(OPEN, 1)
            digits = [[token - FIRST_SYMBOL for token in part] for part in (tokens[1:middle], tokens[middle + 1 : ask])]
            total = [token - FIRST_SYMBOL for token in tokens[ask + 1 :]]
            first, second, result = (sum(d * 10**i for i, d in enumerate(x)) for x in (*digits, total))
            assert (first + second) % 10 ** len(total) == result
            for i, (_, depth) in enumerate(episode[ask + 1 :]):
                run = 0  # places just below whose sum of 9 passes a carry on
                while i - 1 - run >= 0 and digits[0][i - 1 - run] + digits[1][i - 1 - run] == 9:
                    run += 1
                reaches = i - 1 - run >= 0
                assert depth == 1 + run + reaches


def test_brackets_match():
    for index in range(10):
        for episode in episodes("brackets", index):
            stack = []
            for token, depth in episode[1:]:
                if depth:
                    assert depth == len(stack) and token == stack.pop() + 8
                else:
                    stack.append(token)
            assert not stack


def test_unknown_task_and_small_vocabulary():
    with pytest.raises(DataError, match="uniform, copy, reverse"):
        rows("nope")
    with pytest.raises(DataError, match="16 or more, not 8"):
        rows("copy", vocab_size=8)
