"""The process that waits most for its data is named where it waits more than the others do."""

import numpy as np

from adaptive.training.stragglers import Stragglers, slowest


def test_one_that_lags_is_named():
    line = slowest(np.array([[0.1, 60], [9.0, 60], [0.2, 60], [0.0, 60]]))
    assert (
        line.startswith("process 1 keeps the others waiting") and "9.0 s of 60.0 s" in line and "a usual one 0." in line
    )
    assert slowest(np.array([[9.0, 60], [9.5, 60], [9.2, 60]])) == ""  # all wait alike: the alarm of data tells it
    alone = Stragglers()
    alone.add(50)
    assert alone.compared() == ""
