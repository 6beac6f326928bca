"""train.remat=auto: the least that is recomputed of what fits."""

import dataclasses

import jax
import pytest
import shapes

from adaptive.errors import NoRoomError
from adaptive.parallel.mesh import make_mesh
from adaptive.recipe import Recipe
from adaptive.training import fitting
from adaptive.training.fitting import fitted, memory_limit
from adaptive.training.program import Program, Steps

GIB = 2**30
NEEDS = {"none": 30 * GIB, "attention": 20 * GIB, "dots": 12 * GIB, "layer": 5 * GIB}


@dataclasses.dataclass
class Compiling:
    """Stands for compiled steps: each policy needs what NEEDS says, or nobody tells how much."""

    program: Program
    silent: tuple[str, ...] = ()

    def __post_init__(self):
        if self.program.remat in self.silent:
            raise NoRoomError("does not fit")

    @property
    def first(self):
        return self

    def needs(self) -> int:
        return NEEDS[self.program.remat]


@pytest.fixture
def program():
    def made(remat="auto", rows=8) -> Program:
        settings = ("data.seq_len=64", "mesh.data=8", f"train.batch_size={8 * rows}", f"train.remat={remat}")
        recipe = Recipe(name="made", model=shapes.plain(2)).with_(*settings)
        return Program(recipe, make_mesh(recipe.mesh))

    return made


@pytest.mark.parametrize(
    ("memory", "silent", "why"),
    [
        (32, (), "none needs 30.0 GiB of 30.4 GiB"),
        (31, (), "attention needs 20.0 GiB of 29.4 GiB; none needs 30.0 GiB"),
        (20, ("none",), "dots needs 12.0 GiB of 19.0 GiB; none needs more; attention needs 20.0 GiB"),
        (
            12,
            ("attention", "dots"),
            "layer needs 5.0 GiB of 11.4 GiB; none needs 30.0 GiB; attention needs more; dots needs more",
        ),
    ],
)
def test_the_least_is_recomputed_that_fits_with_something_to_spare(program, monkeypatch, memory, silent, why):
    monkeypatch.setattr(fitting, "Steps", lambda program: Compiling(program, silent))
    monkeypatch.setattr(fitting, "memory_limit", lambda program: memory * GIB)
    fit = fitted(program())
    assert fit.why == why and why.startswith(fit.program.remat) and fit.steps.program is fit.program


def test_what_fits_in_no_way_is_told_with_what_would_make_it_smaller(program, monkeypatch):
    monkeypatch.setattr(fitting, "Steps", Compiling)
    monkeypatch.setattr(fitting, "memory_limit", lambda program: 4 * GIB)
    with pytest.raises(NoRoomError) as error:
        fitted(program())
    for part in ("3.8 GiB of a cpu", "none needs 30.0 GiB; attention needs 20.0 GiB; dots needs 12.0 GiB; layer needs",
                 "train.device_batch_size=4 (a device computes 8 rows at once)", "mesh.fsdp"):  # fmt: skip
        assert part in str(error.value)


def test_cpus_recompute_nothing_and_a_recipe_that_says_what_is_obeyed(program, monkeypatch):
    monkeypatch.setattr(fitting, "Steps", Compiling)
    fit = fitted(program())
    assert fit.program.remat == "none" and fit.why == "none: how much memory a cpu has is not known"
    fit = fitted(program("layer"))
    assert fit.program.remat == "layer" and not fit.why


def test_a_program_that_the_compiler_finds_no_room_for_is_an_error_in_words(program, monkeypatch):
    def compile_train_step(self, at=-1):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Used 19.9G of 15.75G hbm")

    monkeypatch.setattr(Program, "compile_train_step", compile_train_step)
    with pytest.raises(NoRoomError, match=r"does not fit a device: .*Used 19.9G of 15.75G.*train.remat=layer or auto"):
        Steps(program("none"))


@pytest.mark.parametrize(("told", "limit"), [({"bytes_limit": 7}, 7), (None, int(15.75 * GIB))])
def test_a_device_tells_its_memory_or_its_kind_does(told, limit):
    class Device:
        platform, device_kind, process_index = "tpu", "TPU v5 lite", 0

        def memory_stats(self):
            if told is None:
                raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: only supported for addressable devices")
            return told

    class Mesh:
        class devices:
            flat = (Device(),)

    assert memory_limit(type("Of", (), {"mesh": Mesh})) == limit
