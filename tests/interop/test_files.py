"""Reading checkpoint files: archives made here opcode by opcode, and torch's own where it is installed."""

import json
import pickletools
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest

from adaptive.errors import UserError
from adaptive.interop.files import read_tensors, write_safetensors

FLOATS = np.random.default_rng(0).standard_normal(24).astype(np.float32)


# Protocol 2, as torch.save writes it.


def text(value: str) -> bytes:
    return b"X" + struct.pack("<i", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def row(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def called(name: str, *arguments: bytes) -> bytes:
    module, _, last = name.rpartition(".")
    return f"c{module}\n{last}\n".encode() + row(*arguments) + b"R"


def table(**entries: bytes) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in entries.items()) + b"u"


def tensor(key="0", kind="FloatStorage", count=24, offset=0, shape=(4, 6), strides=(6, 1)) -> bytes:
    storage = row(text("storage"), f"ctorch\n{kind}\n".encode(), text(key), text("cpu"), number(count)) + b"Q"
    places = (number(offset), row(*map(number, shape)), row(*map(number, strides)))
    return called("torch._utils._rebuild_tensor_v2", storage, *places, b"\x89", called("collections.OrderedDict"))


def archive(path, content: bytes, data=None, name="archive/data.pkl"):
    pickled = b"\x80\x02" + content + b"."
    list(pickletools.genops(pickled))  # well formed
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(name, pickled)
        for key, value in ({"0": FLOATS} if data is None else data).items():
            file.writestr(f"archive/data/{key}", value.tobytes())
    return path


def test_tensors_of_all_shapes_and_types(tmp_path):
    half, brain = FLOATS.astype(np.float16), FLOATS.astype(ml_dtypes.bfloat16)
    content = table(
        plain=tensor(),
        transposed=tensor(offset=7, shape=(3, 2), strides=(1, 6)),
        broadcast=tensor(shape=(5, 2), strides=(0, 1)),
        scalar=tensor(offset=23, shape=(), strides=()),
        empty=tensor(shape=(0, 3), strides=(3, 1)),
        half=tensor("1", "HalfStorage"),
        brain=tensor("2", "BFloat16Storage"),
        parameter=called("torch._utils._rebuild_parameter", tensor(), b"\x88", called("collections.OrderedDict")),
    )
    found = read_tensors(archive(tmp_path / "a.pt", content, {"0": FLOATS, "1": half, "2": brain}))
    want = FLOATS.reshape(4, 6)
    np.testing.assert_array_equal(found["plain"], want)
    np.testing.assert_array_equal(found["parameter"], want)
    np.testing.assert_array_equal(found["transposed"], want.reshape(-1)[[[7, 13], [8, 14], [9, 15]]])
    np.testing.assert_array_equal(found["broadcast"], np.tile(FLOATS[:2], (5, 1)))
    assert found["scalar"] == FLOATS[23] and found["scalar"].shape == () and found["empty"].shape == (0, 3)
    np.testing.assert_array_equal(found["half"], half.reshape(4, 6))
    np.testing.assert_array_equal(found["brain"], brain.reshape(4, 6))
    assert found["half"].dtype == np.float16 and found["brain"].dtype == ml_dtypes.bfloat16


def test_big_endian_archives(tmp_path):
    path = archive(tmp_path / "a.pt", table(a=tensor()), {"0": FLOATS.astype(">f4")})
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("archive/byteorder", "big")
    np.testing.assert_array_equal(read_tensors(path)["a"], FLOATS.reshape(4, 6))


@pytest.mark.parametrize("names", [("model",), ("state_dict",), ("state_dict", "model")])
def test_tensors_under_the_keys_of_training_scripts(tmp_path, names):
    content = table(a=tensor(), version=number(3))
    for name in reversed(names):
        content = table(**{name: content, "step": number(7)})
    assert list(read_tensors(archive(tmp_path / "a.bin", content))) == ["a"]


def test_settings_that_hang_on_a_tensor_are_left_aside(tmp_path):
    """What a released training run may leave in its checkpoints: an OmegaConf list among a tensor's attributes."""
    settings = table(all=called("omegaconf.listconfig.ListConfig") + table(_content=number(1)) + b"b")
    kept = called("torch._utils._rebuild_parameter_with_state", tensor(), b"\x88", b"}", settings)
    typed = called("torch._tensor._rebuild_from_type_v2", b"ctorch._utils\n_rebuild_tensor_v2\n",
                   b"ctorch\nTensor\n", tensor()[len(b"ctorch._utils\n_rebuild_tensor_v2\n"):-1], settings)  # fmt: skip
    found = read_tensors(archive(tmp_path / "a.pt", table(a=kept, b=typed)))
    np.testing.assert_array_equal(found["a"], FLOATS.reshape(4, 6))
    np.testing.assert_array_equal(found["b"], FLOATS.reshape(4, 6))


@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "argparse.Namespace", "torch.load", "numpy.dtype"])
def test_anything_else_is_refused_and_not_called(tmp_path, name):
    marker = tmp_path / "ran"
    content = table(a=tensor(), b=called(name, text(f"touch {marker}")))
    with pytest.raises(UserError, match=rf"a\.pt holds {name}, .*--allow_pickle"):
        read_tensors(archive(tmp_path / "a.pt", content))
    assert not marker.exists()


@pytest.mark.parametrize(
    ("content", "data", "message"),
    [
        (table(a=tensor(shape=(5, 6))), None, r"is damaged: a tensor of shape \[5, 6\] reaches beyond its data"),
        (table(a=tensor(strides=(-6, 1))), None, "reaches beyond its data"),
        (table(a=tensor(offset=-4)), None, "reaches beyond its data"),
        (table(a=tensor()), {"0": FLOATS[:9]}, "cut off after 36 of 96 bytes"),
        (table(a=tensor("9")), None, r"is damaged: .*archive/data/9"),
        (row(number(1)), None, "no tensors by name, but a tuple"),
        (table(step=number(1)), None, "no tensors by name, but a dict of step"),
    ],
)
def test_contents_that_do_not_fit(tmp_path, content, data, message):
    with pytest.raises(UserError, match=message):
        read_tensors(archive(tmp_path / "a.pt", content, data))


def test_files_that_are_something_else(tmp_path):
    good = archive(tmp_path / "good.pt", table(a=tensor()))
    (tmp_path / "cut.pt").write_bytes(good.read_bytes()[:-40])
    (tmp_path / "old.pt").write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.")
    (tmp_path / "pointer.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    archive(tmp_path / "other.pt", table(a=tensor()), name="archive/other.pkl")
    for name, message in (
        ("gone.pt", r"no file .*gone\.pt; there is cut\.pt"),
        ("cut.pt", r"cut\.pt is damaged"),
        ("old.pt", r"no archive as torch\.save writes it.*--allow_pickle"),
        ("pointer.pt", "git lfs pull"),
        ("other.pt", r"no data\.pkl in it"),
    ):
        with pytest.raises(UserError, match=message):
            read_tensors(tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty has no \*\.safetensors"):
        read_tensors(tmp_path / "empty")


def test_safetensors_there_and_back(tmp_path):
    pytest.importorskip("safetensors")
    tensors = {"a": FLOATS.reshape(4, 6).T, "b": FLOATS.astype(ml_dtypes.bfloat16), "c": FLOATS.astype(np.float16)}
    write_safetensors(tmp_path / "new" / "a.safetensors", tensors)
    found = read_tensors(tmp_path / "new" / "a.safetensors")
    assert set(found) == set(tensors)
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value)
    (tmp_path / "bad.safetensors").write_bytes(b"no header of this kind")
    with pytest.raises(UserError, match=r"bad\.safetensors is damaged or no safetensors file"):
        read_tensors(tmp_path / "bad.safetensors")


def test_a_folder_or_its_index_is_all_its_files(tmp_path):
    pytest.importorskip("safetensors")
    for i, name in enumerate("ab"):
        write_safetensors(tmp_path / f"model-{i}.safetensors", {name: FLOATS + i})
    assert set(read_tensors(tmp_path)) == {"a", "b"}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-0.safetensors", "b": "model-1.safetensors"}}))
    write_safetensors(tmp_path / "unrelated.safetensors", {"c": FLOATS})
    for path in (index, tmp_path):
        found = read_tensors(path)
        assert set(found) == {"a", "b"}
        np.testing.assert_array_equal(found["b"], FLOATS + 1)
    index.write_text(json.dumps({"weight_map": {"a": "model-7.safetensors"}}))
    with pytest.raises(UserError, match=r"names model-7\.safetensors, which is not beside it"):
        read_tensors(index)
    index.write_text("[]")
    with pytest.raises(UserError, match="not a checkpoint index"):
        read_tensors(tmp_path)
    index.unlink()
    write_safetensors(tmp_path / "model-2.safetensors", {"a": FLOATS})
    with pytest.raises(UserError, match="a is in two of its files"):
        read_tensors(tmp_path)


def test_a_package_that_is_absent_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    with pytest.raises(UserError, match=r"pip install 'adaptive\[hf\]'"):
        write_safetensors(tmp_path / "a.safetensors", {"a": FLOATS})
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(UserError, match="torch, which is not installed"):
        read_tensors(archive(tmp_path / "a.pt", table(a=tensor())), allow_pickle=True)


def test_files_of_torch(tmp_path):
    torch = pytest.importorskip("torch")
    base = torch.arange(24.0).reshape(4, 6)
    state = torch.nn.Linear(3, 2).state_dict()
    state |= {"view": base.T[1:4], "brain": base.bfloat16(), "parameter": torch.nn.Parameter(base[0])}
    torch.save({"model": state}, tmp_path / "new.pt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for found in (
        read_tensors(tmp_path / "new.pt"),
        read_tensors(tmp_path / "new.pt", allow_pickle=True),
        read_tensors(tmp_path / "old.pt", allow_pickle=True),
    ):
        assert set(found) == set(state) and found["brain"].dtype == ml_dtypes.bfloat16
        for name, value in state.items():
            np.testing.assert_array_equal(found[name].astype(np.float32), value.detach().float().numpy())
