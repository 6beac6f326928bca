"""Who has gone is told to all others, unless it said goodbye."""

import threading

import pytest

from adaptive.parallel.lifeline import Lifeline


class Heard:
    def __init__(self):
        self.who, self.stopped, self.event = [], [], threading.Event()

    def __call__(self, who, stopped):
        self.who.append(who)
        self.stopped.append(stopped)
        self.event.set()


def job():
    """The lines of three processes, and what each hears."""
    heard = [Heard() for _ in range(3)]
    first, port = Lifeline.listen(heard[0], 3)
    return heard, [first, *(Lifeline.connect(heard[i], "127.0.0.1", port, i) for i in (1, 2))]


def broken(line):
    """As the end of its process would leave it."""
    peer = line._peers[0]
    line._ended = True
    peer.shutdown(2)


def test_one_that_is_lost_is_named_to_all_others():
    heard, lines = job()
    broken(lines[1])
    for listener in (heard[0], heard[2]):
        assert listener.event.wait(30) and listener.who[0].startswith("process 1 on ")
    assert not heard[1].who and lines[0].told.is_set() and heard[2].stopped == [False]


@pytest.mark.parametrize("which", [0, 1])
def test_one_that_was_asked_to_stop_ends_the_others_as_that(which):
    heard, lines = job()
    while len(lines[0]._peers) < 2:
        threading.Event().wait(0.01)
    lines[which].close(stopped=f"process {which}")
    for listener in (heard[1 - which], heard[2]):
        assert listener.event.wait(30) and listener.who[0].startswith(f"process {which}")
        assert listener.stopped == [True]
    assert not heard[which].who


def test_one_that_comes_later_is_told_as_well():
    heard = [Heard() for _ in range(3)]
    first, port = Lifeline.listen(heard[0], 3)
    broken(Lifeline.connect(heard[1], "127.0.0.1", port, 1))
    assert first.told.wait(30)
    Lifeline.connect(heard[2], "127.0.0.1", port, 2)
    assert heard[2].event.wait(30) and heard[2].who[0].startswith("process 1 on ")


def test_process_0_is_missed_by_all():
    heard, lines = job()
    for _ in range(2000):
        if len(lines[0]._peers) == 2:
            break
        threading.Event().wait(0.01)
    lines[0]._ended = True
    for peer in lines[0]._peers.values():
        peer.shutdown(2)
    for listener in heard[1:]:
        assert listener.event.wait(30) and listener.who == ["process 0"]


def test_nobody_misses_one_that_said_goodbye():
    heard, lines = job()
    lines[2].close()
    broken(lines[1])
    assert heard[0].event.wait(30)
    assert heard[0].who[0].startswith("process 1 on ") and not heard[2].who
