"""The order of rows is what grain's data sets give: runs that were saved go on in it."""

import grain
import pytest

from adaptive.data.order import Order


class Rows:
    def __init__(self, source, count):
        self.source, self.count = source, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return self.source, int(index)


@pytest.mark.parametrize("weights", [[1.0], [0.7, 0.3], [0.2, 0.5, 0.3]])
@pytest.mark.parametrize("seed", [None, 0, 9])
def test_the_order_is_that_of_grain(weights, seed):
    lengths = [23, 7, 11][: len(weights)]
    parts = []
    for i, length in enumerate(lengths):
        rows = grain.MapDataset.source(Rows(i, length)).seed((seed or 0) + i)
        parts.append((rows if seed is None else rows.shuffle()).repeat())
    expected = parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, weights=weights)
    sequences = range(3, 130, 2)  # several epochs
    found = zip(*(each.tolist() for each in Order(lengths, weights, seed).rows(sequences)), strict=True)
    assert list(found) == [expected[i] for i in sequences]
