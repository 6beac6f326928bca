"""Who exchanges how much with whom, in the text of a compiled program."""

import numpy as np
import pytest

from adaptive.benchmarks.compiled_text import Exchange, Text
from adaptive.benchmarks.scopes import Scopes
from adaptive.benchmarks.traffic import Received, received

PROGRAM = """HloModule jit_step, entry_computation_layout={()->f32[]}, num_partitions=8

FileNames
1 "/any/where/adaptive/layers/linear.py"
2 "/any/where/adaptive/layers/block.py"
3 "/any/where/site-packages/jax/api.py"

FunctionNames
1 "times"
2 "Block.__call__"
3 "wrapped"

FileLocations
1 {file_name_id=1 function_name_id=1 line=7 end_line=7 column=1 end_column=2}
2 {file_name_id=2 function_name_id=2 line=9 end_line=9 column=1 end_column=2}
3 {file_name_id=3 function_name_id=3 line=1 end_line=1 column=1 end_column=2}

StackFrames
1 {file_location_id=3 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=1 parent_frame_id=3}

ENTRY %main.1 (p.3: f32[64,16]) -> f32[] {
  %p.3 = f32[64,16]{1,0} parameter(0)
  COLLECTIVE
  ROOT %done = f32[] constant(0)
}
"""


def only(line: str) -> Exchange:
    (found,) = Text(PROGRAM.replace("COLLECTIVE", line)).exchanges()
    return found


@pytest.mark.parametrize(("written", "groups"), [
    ("replica_groups={{0,1,2,3},{4,5,6,7}}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ("replica_groups=[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ("replica_groups=[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("replica_groups=mesh['a'=2,'b'=4] {'b'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ("replica_groups=mesh['a'=2,'b'=4] {'a'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("replica_groups=mesh['a'=8] {'a':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
    ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", [list(range(8))]),
    ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ("replica_groups=mesh['a'=4,'b'=2], device_ids=([8]) {'b'}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
    ("channel_id=1", [list(range(8))]),
])  # fmt: skip
def test_every_way_of_writing_who_takes_part(written, groups):
    found = only(f"%all-reduce.1 = f32[64,16]{{1,0}} all-reduce(%p.3), {written}, to_apply=%add")
    assert found.groups.tolist() == groups and found.bytes == found.result == 4096


ONE, TWO = np.zeros(8, int), np.repeat([0, 1], 4)


@pytest.mark.parametrize(("line", "within", "across"), [
    # (n - 1) / n of the whole; over two slices of four each slice first, then the share of a device between them
    ("all-gather(%p.3), replica_groups=[1,8]<=[8]", (3584, 0), (3072, 512)),
    ("all-reduce(%p.3), replica_groups=[1,8]<=[8]", (7168, 0), (6144, 1024)),
    ("all-to-all(%p.3), replica_groups=[1,8]<=[8]", (3584, 0), (1536, 2048)),
    ("reduce-scatter(%p.3), replica_groups=[2,4]<=[8]", (3 * 4096, 0), (3 * 4096, 0)),
    ("all-gather(%p.3), replica_groups=[4,2]<=[2,4]T(1,0)", (2048, 0), (0, 2048)),
    ("send(%p.3, %token), channel_id=9, is_host_transfer=true", (0, 4096), (0, 4096)),
    ("collective-permute(%p.3), source_target_pairs={{0,4},{4,0}}", (4096, 0), (0, 4096)),
])  # fmt: skip
def test_bytes_that_a_device_receives(line, within, across):
    found = [only(f"%x.1 = f32[64,16]{{1,0}} {line}")]
    for slices, want in ((ONE, within), (TWO, across)):
        (got,) = received(found, slices).values()
        assert got == pytest.approx(Received(*want))


def test_a_scope_is_the_innermost_code_of_ours_that_is_not_everybodys():
    scopes = Scopes(PROGRAM)
    line = '%a = f32[] add(), metadata={op_name="jit(step)/transpose(jvp())/while/add" stack_frame_id=3}'
    assert scopes.of([line]) == "backward, layers/block.py Block.__call__"
    assert scopes.of([line.replace('add"', 'rematted_computation/add"')]).startswith("computed again, layers")
    assert scopes.of([line.replace("transpose(jvp())", "jvp()")]).startswith("forward, ")
    assert scopes.of(["%a = f32[] add()"]) == "not told"
