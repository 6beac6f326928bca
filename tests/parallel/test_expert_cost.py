"""The cost model against numbers computed by hand."""

import dataclasses
import subprocess
import sys

import pytest

from adaptive.parallel.config import ExpertParallel
from adaptive.parallel.expert_cost import FLOPS_PER_BYTE, ExpertLoad, cost, settle

AUTO = ExpertParallel()
# 1024 tokens of width 512, two experts each, of 8 experts with 1024 gated hidden units on 4 devices, bfloat16.
LOAD = ExpertLoad(tokens=1024, pairs=2048, rows=2048, experts=8, width=512, hidden=1024, devices=4)


@pytest.mark.parametrize(
    ("strategy", "sent"),
    [
        ("expert", 2 * 2048 * 512 * 2 * 3 // 4),  # 3 MiB: there and back, a quarter stays
        ("gather", 3 * (2 * 1024 * 512 * 2 + 8 * 2048)),  # its tokens to three others, three sums to others
        ("tensor", 3 * (2 * 1024 * 512 * 2 + 8 * 2048)),
        ("data", 3 * 8 * 512 * 1024 * 2 * 3 // 4),  # 18 MiB of the 24 of the matrices
    ],
)
def test_bytes_sent(strategy, sent):
    assert cost(strategy, LOAD, AUTO).sent == sent


def test_all_to_all_is_smaller_while_each_token_has_fewer_experts_than_there_are_devices():
    """Token all-to-all sends K (EP - 1) / EP against EP - 1: equal at K = EP, but for the routing."""
    for k, smaller in ((2, "expert"), (3, "expert"), (5, "gather")):
        load = dataclasses.replace(LOAD, pairs=1024 * k, rows=1024 * k, width=4096)
        costs = {name: cost(name, load, AUTO).sent for name in ("expert", "gather")}
        assert min(costs, key=costs.__getitem__) == smaller


def test_a_two_level_exchange_sends_twice():
    """Half leaves for a neighbour on the node, half for the other node: 1/2 + 1/2 of the rows, against 3/4."""
    two = ExpertParallel("expert", "hierarchical", 2)
    assert cost("expert", LOAD, two).sent == 2 * 2048 * 512 * 2


def test_slots_are_sent_whether_they_hold_a_token_or_not():
    padded = dataclasses.replace(LOAD, rows=2048 * 1.25)
    assert cost("expert", padded, AUTO).sent == 1.25 * cost("expert", LOAD, AUTO).sent


def test_the_busiest_device_is_waited_for_where_experts_are_split():
    uneven = dataclasses.replace(LOAD, imbalance=1.5, tensor=2)
    flops = 2 * 3 * 2048 * 512 * 512  # the pairs of a device by its half of the hidden units
    for strategy, waited in (("expert", flops // 2), ("gather", flops // 2), ("data", 0), ("tensor", 0)):
        c = cost(strategy, uneven, AUTO)
        assert c.waited == waited
        assert c.total == c.sent + waited / FLOPS_PER_BYTE


@pytest.mark.parametrize(
    ("changed", "want"),
    [
        ({}, "expert"),
        ({"pairs": 8192, "rows": 8192}, "gather"),  # all experts for every token
        ({"tokens": 65536, "pairs": 131072, "rows": 131072}, "data"),  # weights are the smaller part
        ({"experts": 6}, "tensor"),  # 4 does not divide 6
        ({"pairs": 8192, "rows": 8192, "imbalance": 2.0}, "tensor"),  # waiting costs more than sending
    ],
)
def test_the_cheapest_is_chosen(changed, want):
    settings, lines = settle(AUTO, dataclasses.replace(LOAD, **changed))
    assert settings == ExpertParallel(want)
    assert len(lines) == 4
    assert [line for line in lines if "the cheapest" in line] == [line for line in lines if line.startswith(want)]


def test_reasons_are_given():
    lines = settle(AUTO, dataclasses.replace(LOAD, experts=6, hidden=1022))[1]
    assert lines[0] == "expert not possible: 4 devices do not divide 6 experts"
    assert "4 devices do not divide 1022 hidden units" in lines[-1]
    lines = settle(ExpertParallel("gather"), LOAD)[1]
    assert lines[0] == "expert sends 3 MiB a layer and device"
    assert lines[1].endswith("<- as the recipe says")
    huge = dataclasses.replace(LOAD, experts=64, width=8192, hidden=4096)
    assert "48 GiB" not in lines[2] and "above 2 GiB" in settle(AUTO, huge)[1][2]
    assert settle(AUTO, dataclasses.replace(LOAD, devices=1))[1] == ["experts on one device: nothing is sent"]


def test_needs_no_jax():
    code = "import sys, adaptive.parallel.expert_cost; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
