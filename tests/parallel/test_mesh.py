"""Which device is where on the mesh, and which rows a process feeds; no program is compiled."""

import dataclasses

import pytest

from adaptive.errors import MeshError, RecipeError
from adaptive.parallel.config import MeshConfig
from adaptive.parallel.mesh import make_mesh, share_of_rows
from adaptive.parallel.rules import AxisRules

BATCH = AxisRules().batch


@dataclasses.dataclass(frozen=True)
class Device:
    """As far as a mesh asks."""

    id: int
    process_index: int
    slice_index: int | None = None
    device_kind: str = "cpu"
    platform: str = "cpu"


def devices(count: int, per_process: int, of_slice=lambda number: None) -> list[Device]:
    return [Device(number, number // per_process, of_slice(number)) for number in range(count)]


def numbers(mesh):
    return [device.id for device in mesh.devices.flat]


def test_data_runs_across_slices_and_everything_else_stays_within():
    mesh = make_mesh(MeshConfig(data=4, tensor=2, slices=2), devices(8, 1))
    assert numbers(mesh) == list(range(8))
    mesh = make_mesh(MeshConfig(data=2, fsdp=4, slices=2), devices(8, 1, lambda number: number % 2))
    assert numbers(mesh) == [0, 2, 4, 6, 1, 3, 5, 7]


def test_other_axes_run_across_slices_where_data_does_not_fill_them():
    mesh = make_mesh(MeshConfig(data=1, stage=2, fsdp=4, slices=4), devices(8, 1, lambda number: number // 2))
    grid = mesh.devices.reshape(2, 4)  # stage, fsdp
    assert [[device.slice_index for device in row] for row in grid] == [[0, 0, 1, 1], [2, 2, 3, 3]]


def test_slices_of_different_sizes_are_refused():
    with pytest.raises(MeshError, match="different numbers of devices: 3, 5"):
        make_mesh(MeshConfig(slices=2), devices(8, 1, lambda number: int(number > 2)))


def test_slices_that_are_not_told_are_asked_for():
    pods = [dataclasses.replace(device, platform="tpu") for device in devices(8, 1, lambda number: number // 4)]
    with pytest.raises(MeshError, match=r"2 slices.*set mesh\.slices=2"):
        make_mesh(MeshConfig(), pods)


@pytest.mark.parametrize(
    ("config", "shares"),
    [
        (MeshConfig(), [(0, 4), (1, 4), (2, 4), (3, 4)]),
        (MeshConfig(fsdp=2), [(0, 4), (1, 4), (2, 4), (3, 4)]),
        (MeshConfig(tensor=4), [(0, 2), (0, 2), (1, 2), (1, 2)]),
        (MeshConfig(context=4), [(0, 2), (0, 2), (1, 2), (1, 2)]),
        (MeshConfig(context=8), [(0, 1)] * 4),
        (MeshConfig(stage=2), [(0, 2), (1, 2), (0, 2), (1, 2)]),
        (MeshConfig(stage=2, data=1, context=2, tensor=2), [(0, 1)] * 4),
    ],
)
def test_processes_that_hold_the_same_rows_feed_the_same(config, shares):
    """Four processes of two devices."""
    mesh = make_mesh(config, devices(8, 2))
    assert [share_of_rows(mesh, BATCH, process) for process in range(4)] == shares


def test_rows_of_a_process_need_not_be_neighbours():
    """As where a mesh follows the links of a machine: every process has a share of its own."""
    swapped = [devices(8, 2)[number] for number in (0, 2, 1, 3, 4, 6, 5, 7)]
    mesh = make_mesh(MeshConfig(), swapped)
    assert numbers(mesh) == [0, 2, 1, 3, 4, 6, 5, 7]
    assert [share_of_rows(mesh, BATCH, process) for process in range(4)] == [(0, 4), (1, 4), (2, 4), (3, 4)]


def test_rows_that_overlap_are_fed_whole():
    ragged = [Device(number, process) for number, process in enumerate((0, 0, 0, 1, 0, 1, 1, 1))]
    mesh = make_mesh(MeshConfig(tensor=2), ragged)
    assert [share_of_rows(mesh, BATCH, process) for process in range(2)] == [(0, 1), (0, 1)]


def test_one_axis_takes_what_is_left():
    assert make_mesh(MeshConfig(data=1, context=-1, tensor=2), devices(8, 2)).shape["context"] == 4
    MeshConfig(data=2, expert=-1).validate([])
    with pytest.raises(RecipeError, match=r"mesh\.data and mesh\.fsdp are both -1.*set it, to 1"):
        MeshConfig(fsdp=-1).validate([])
    with pytest.raises(RecipeError, match=r"mesh\.stage=0: must be at least 1, or -1"):
        MeshConfig(stage=0).validate([])
