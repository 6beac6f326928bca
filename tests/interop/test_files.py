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
from adaptive.interop.folder import weight_files

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


def storage(kind="FloatStorage", key="0", count=24) -> bytes:
    return row(text("storage"), f"ctorch\n{kind}\n".encode(), text(key), text("cpu"), number(count)) + b"Q"


def tensor(key="0", kind="FloatStorage", count=24, offset=0, shape=(4, 6), strides=(6, 1)) -> bytes:
    places = (storage(kind, key, count), number(offset), row(*map(number, shape)), row(*map(number, strides)))
    return called("torch._utils._rebuild_tensor_v2", *places, b"\x89", called("collections.OrderedDict"))


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
        (table(a=tensor(shape=(2**20, 2**20), strides=(0, 0))), None, "more numbers than its data, 24"),
        (table(a=called("torch._utils._rebuild_qtensor", storage("QInt8Storage"))), None, "a is QInt8; .*quantised"),
        (table(a=tensor(kind="ComplexFloatStorage")), None, "a is ComplexFloat; weights are read in float16, bfloat16"),
        (
            table(
                a=called(
                    "torch._utils._rebuild_tensor_v3",
                    storage("UntypedStorage"),
                    number(0),
                    row(number(24)),
                    row(number(1)),
                    b"\x89",
                    called("collections.OrderedDict"),
                    b"ctorch\nfloat8_e4m3fn\n",
                )
            ),
            None,
            "a is float8_e4m3fn; .*quantised",
        ),
        (b"K\x00r" + struct.pack("<I", 2**30) + b"0" + table(a=tensor()), None, "numbers an object 1073741824"),
        (table(a=tensor()), {"0": FLOATS[:9]}, "cut off after 36 of 96 bytes"),
        (table(a=tensor("9")), None, r"is damaged: .*archive/data/9"),
        (row(number(1)), None, "no tensors by name, but a tuple"),
        (table(step=number(1)), None, "no tensors by name, but a dict of step"),
    ],
)
def test_contents_that_do_not_fit(tmp_path, content, data, message):
    with pytest.raises(UserError, match=message):
        read_tensors(archive(tmp_path / "a.pt", content, data))


def test_an_archive_that_unfolds_is_refused_before_it_does(tmp_path):
    """A file of a few kilobytes whose zeros would fill the memory."""
    path = archive(tmp_path / "a.pt", table(a=tensor(count=2**26, shape=(2**26,), strides=(1,))))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(
            "archive/data.pkl", b"\x80\x02" + table(a=tensor(shape=(2**26,), strides=(1,), count=2**26)) + b"."
        )
        file.writestr("archive/data/0", bytes(2**20))
    with pytest.raises(UserError, match=r"a\.pt claims to hold more than its [\d,]+ bytes: it is compressed"):
        read_tensors(path)


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


def header(path, **tensors) -> None:
    """A safetensors file of this header and eight bytes."""
    head = json.dumps(tensors).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + bytes(8))


def test_safetensors_that_numpy_has_no_numbers_for_or_that_claim_too_much(tmp_path):
    path = tmp_path / "a.safetensors"
    header(path, x={"dtype": "F8_E4M3", "shape": [2, 4], "data_offsets": [0, 8]})
    with pytest.raises(UserError, match=r"a\.safetensors: x is F8_E4M3; weights are read in float16.*quantised ones"):
        read_tensors(path)
    for offsets in ([0, 8], [0, 2**42]):
        header(path, x={"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": offsets})
        with pytest.raises(UserError, match="is damaged or no safetensors file"):
            read_tensors(path)


MISTRAL = ("consolidated.safetensors", "model-1.safetensors", "model-2.safetensors", "adapter_model.safetensors")
TRAINED = ("pytorch_model.bin", "training_args.bin", "optimizer.bin", "rng_state_0.pth", "scheduler.pt")
PARTS = ("part1.safetensors", "part2.safetensors")
TORCH = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")
META = ("consolidated.00.pth", "consolidated.01.pth")


@pytest.mark.parametrize(
    ("names", "read"),
    [
        (MISTRAL, set(MISTRAL[1:3])),
        ((*MISTRAL, *TRAINED, *META), set(MISTRAL[1:3])),
        (("model.safetensors", "consolidated-1.safetensors"), {"model.safetensors"}),
        ((*PARTS, "adapter_model.safetensors"), set(PARTS)),
        (("adapter_model.safetensors", *TORCH), set(TORCH)),
        (TRAINED, {"pytorch_model.bin"}),
        (META, set(META)),
        (("a.safetensors", "b-1.safetensors", "b-2.safetensors"), "a.safetensors; b-1.safetensors and 1 more. Give a"),
        (("adapter_model.safetensors", "optimizer.pt"), "no weights of a whole model, only adapter_model"),
        (("notes.txt",), r"has no \*\.safetensors"),
    ],
)  # fmt: skip
def test_of_a_folder_one_set_of_weights_is_read(tmp_path, names, read):
    for name in names:
        (tmp_path / name).touch()
    if isinstance(read, set):
        assert {file.name for file in weight_files(tmp_path)} == read
        return
    with pytest.raises(UserError, match=read):
        weight_files(tmp_path)


def test_the_index_of_a_set_comes_before_its_files(tmp_path):
    for name in (*MISTRAL, "model.safetensors"):
        (tmp_path / name).touch()
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    (tmp_path / "consolidated.safetensors.index.json").write_text("{}")
    assert weight_files(tmp_path) == [tmp_path / "model-1.safetensors"]
    for text, message in (
        ('{"weight_map": {"a": "../model-1.safetensors"}}', "which is not beside it"),
        ("[" * 100_000, "not a checkpoint index"),
    ):
        index.write_text(text)
        with pytest.raises(UserError, match=message):
            weight_files(tmp_path)
    with pytest.raises(
        UserError, match=r"no file .*other\.index\.json; there is consolidated\.safetensors\.index\.json"
    ):
        weight_files(tmp_path / "other.index.json")


def test_a_package_that_is_absent_is_named(tmp_path, monkeypatch):
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
