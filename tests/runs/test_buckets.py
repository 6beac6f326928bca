"""Runs and data in buckets: gs:// through TensorStore's own client and fsspec, against a server and memory here."""

import json
import logging
import socket
import subprocess

import buckets
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptive import report, train
from adaptive.data.fetch import here
from adaptive.data.find import find
from adaptive.data.foreign import open_tokens
from adaptive.data.tokenizers import load_tokenizer
from adaptive.errors import CheckpointError, DataError, UserError
from adaptive.paths import absolute, bucket_path, bucket_scheme
from adaptive.recipe import load
from adaptive.runs import mirror as mirrors
from adaptive.runs.checkpoint import Checkpoints, read_part, steps_in
from adaptive.runs.config import CheckpointConfig
from adaptive.runs.folder import RunFolder
from adaptive.runs.load import find as find_run
from adaptive.runs.mirror import Mirror, place_of
from adaptive.runs.state import TrainState
from adaptive.training.log import read_rows

RUN = "gs://bucket/runs/one two"


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("ADAPTIVE_CACHE", raising=False)
    with buckets.opened(monkeypatch) as objects:
        yield objects


def put(objects, address: str, content: bytes) -> None:
    buckets.Bucket().pipe_file(address, content)
    assert buckets.Bucket._strip_protocol(address) in objects


# Addresses


def test_addresses_in_buckets(bucket):
    assert [bucket_scheme(text) for text in (RUN, "S3://b/x", "hf://a/b", "gs:/x", "./gs://b", "/a")] == [
        "gs", "s3", "", "", "", "",
    ]  # fmt: skip
    assert str(bucket_path("gs://bucket/a b/", "--workdir")) == "gs://bucket/a b"
    assert absolute(bucket_path(RUN, "")) == bucket_path(RUN, "") and absolute("a").is_absolute()


@pytest.mark.parametrize(
    ("text", "why"),
    [("gs://", "no address in a bucket"), ("gs:///", "no address in a bucket"), ("gs://a\0b", "holds a zero byte")],
)
def test_what_is_no_address_is_refused(bucket, text, why):
    with pytest.raises(UserError, match=rf"^--workdir: .*{why}"):
        place_of(text, "--workdir")


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"gs://b/x needs the package gcsfs: pip install 'adaptive-lm\[gcs\]'"):
        place_of("gs://b/x", "--workdir")
    with pytest.raises(UserError, match=r"data\.paths: s3://b/x .* s3fs: pip install 'adaptive-lm\[s3\]'"):
        load("mor_tiny").with_("data.source=files", "data.paths=s3://b/x").validate()


def test_buckets_without_checkpoints_are_refused_for_runs(bucket):
    with pytest.raises(UserError, match="--workdir: s3://b/x: Orbax writes checkpoints to folders and to gs://"):
        place_of("s3://b/x", "--workdir")


# Checkpoints


def state(value: float) -> TrainState:
    zero, key = jnp.int32(0), jax.random.key_data(jax.random.key(0))
    return TrainState(zero, zero, {"a": jnp.full((4, 3), value)}, {}, {"m": jnp.ones(3)}, key)


@pytest.mark.compiles
def test_checkpoints_in_a_bucket(bucket):
    folder = bucket_path(f"{RUN}/checkpoints", "")
    said: list[str] = []
    kept = Checkpoints(folder, CheckpointConfig(keep_last=2), {}, say=said.append)
    for step in (1, 2, 3):
        kept.save(step, state(step), {"position": step})
    kept.wait()
    assert kept.steps() == steps_in(folder) == [2, 3] and not [key for key in bucket if "/checkpoints/1/" in key]
    put(bucket, f"{RUN}/checkpoints/4/state/d/half", b"of a save that was killed")
    assert kept.steps() == [2, 3]
    bucket["/bucket/runs/one two/checkpoints/3/state/manifest.ocdbt"].write(b"damaged")
    found = kept.restore(state(0))
    assert found.step == 2 and found.data_state == {"position": 2} and float(found.state.params["a"][0, 0]) == 2
    assert "checkpoint 3 cannot be read" in said[-1]
    kept.save(4, state(4), {})  # removes the half, and puts aside what is damaged
    kept.close()
    assert steps_in(folder) == [2, 4] and not [key for key in bucket if key.endswith("/half")]
    assert [key for key in bucket if "/3.unreadable/" in key] and not [key for key in bucket if "/3/" in key]
    part = read_part(folder, 4, {"params": {"a": state(0).params["a"]}})
    assert float(part["params"]["a"].sum()) == 48


# Runs


@pytest.mark.compiles
def test_a_run_in_a_bucket_goes_on_on_another_machine(bucket, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["--recipe", "vanilla_tiny", "--workdir", RUN, "data.seq_len=32", "train.batch_size=8", "log.every=1",
             "train.loss_chunk=0", "eval.rows=2", "log.sample_tokens=0", "log.wandb=disabled", "model.width=16",
             "schedule.warmup_steps=0", "schedule.kind=constant", "checkpoint.every=1"]  # fmt: skip
    assert train.main([*words, "train.steps=1"]) == 0
    out = capsys.readouterr().out
    assert f"workdir      {RUN}\n" in out and f"report       {RUN}/report.html\n" in out
    names = {key.removeprefix("/bucket/runs/one two/") for key in bucket}
    assert {"recipe.json", "run.json", "metrics.jsonl", "starts.jsonl", "report.html", "plan.json"} <= names
    assert not list(tmp_path.glob("gs*")) and not list(tmp_path.glob("runs"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    assert train.main([*words, "train.steps=2"]) == 0
    assert f"resuming  {RUN} from step 1" in capsys.readouterr().out
    folder = RunFolder.at(RUN, "WORKDIR")
    assert sorted({row["step"] for row in read_rows(folder.path)}) == [1, 2] and folder.saved == 0
    assert len((folder.path / "starts.jsonl").read_text().splitlines()) == 2
    found = find_run(RUN)
    assert found.steps == (1, 2) and str(found.checkpoints) == f"{RUN}/checkpoints"
    bucket.pop("/bucket/runs/one two/report.html")
    assert report.main([RUN]) == 0 and "/bucket/runs/one two/report.html" in bucket
    assert train.main([*words, "train.steps=2", "train.seed=7"]) == 2
    assert f"{RUN} holds a run of another recipe" in capsys.readouterr().err


def test_a_run_that_is_trained_elsewhere_is_refused(bucket, monkeypatch):
    monkeypatch.setattr(mirrors, "BEAT_S", 0.05)
    monkeypatch.setattr(mirrors, "SILENCE_S", 1.0)
    said: list[str] = []
    monkeypatch.setattr(mirrors, "_is_gone", lambda owner: False)  # as from another machine
    first, second = Mirror(RUN), Mirror(RUN)
    first.claim(said.append)
    first.pull()
    (first.local / "new.txt").write_text("kept")
    with pytest.raises(CheckpointError, match="is in use by"):
        RunFolder.open(RUN, load("mor_tiny"), say=said.append)
    RunFolder.at(RUN, "--checkpoint")
    assert (first.local / "new.txt").exists()  # neither touches the files of the one that trains
    with pytest.raises(CheckpointError, match=r"gs://bucket/runs/one two is in use by process \d+ on"):
        second.claim(said.append)
    first.release()
    assert bucket["/bucket/runs/one two/new.txt"].getvalue() == b"kept"
    said.clear()
    second.claim(said.append)  # at once
    assert not said
    second._stop.set()  # killed
    second._thread.join()
    third = Mirror(RUN)
    third.claim(said.append)
    assert "watching" in said[-2] and "taking over" in said[-1]
    third.abandon()
    assert "/bucket/runs/one two/run.lock" not in bucket


def test_a_lost_process_of_this_machine_is_known_at_once(bucket):
    said: list[str] = []
    ended = subprocess.Popen(["true"])
    ended.wait()
    owner = {"pid": ended.pid, "host": socket.gethostname(), "beats": 1}
    put(bucket, f"{RUN}/run.lock", json.dumps(owner).encode())
    run = Mirror(RUN)
    run.claim(said.append)
    assert len(said) == 1 and f"process {ended.pid} on {socket.gethostname()} ended" in said[0]
    run.abandon()


def test_what_is_no_run_is_left_as_it_is(bucket):
    put(bucket, "gs://bucket/texts/a.txt", b"text")
    with pytest.raises(CheckpointError, match="is not the folder of a run"):
        RunFolder.open("gs://bucket/texts", load("mor_tiny"), say=lambda line: None)
    assert [*bucket] == ["/bucket/texts/a.txt"]


def test_a_bucket_that_cannot_be_written_is_told(bucket, monkeypatch):
    def refuse(self, path, mode, **_):
        raise PermissionError("403: no permission")

    opened = buckets.Bucket._open
    monkeypatch.setattr(buckets.Bucket, "_open", lambda self, path, mode="rb", **_: (
        refuse(self, path, None) if "w" in mode else opened(self, path, mode)))  # fmt: skip
    with pytest.raises(CheckpointError, match=r"cannot write to gs://bucket/runs/one two: .*403"):
        RunFolder.open(RUN, load("mor_tiny"), say=lambda line: None)
    monkeypatch.setattr(buckets.Bucket, "_open", refuse)
    for read in (lambda: RunFolder.open(RUN, load("mor_tiny"), say=print), Mirror(RUN)._owner):
        with pytest.raises(CheckpointError, match=r"cannot read gs://bucket/runs/one two: 403"):
            read()


# Data


def test_texts_in_a_bucket_are_copied_once_and_anew_when_they_change(bucket, caplog):
    caplog.set_level(logging.INFO, "adaptive.data")
    put(bucket, "s3://data/texts/a.txt", b"one")
    put(bucket, "s3://data/texts/deep/b.jsonl", b'{"text": "two"}\n')
    put(bucket, "s3://data/texts/.hidden.txt", b"no")
    put(bucket, "s3://data/texts/model.safetensors", b"no")
    for address, names in {
        "s3://data/texts": ["a.txt", "b.jsonl"],
        "s3://data/texts/a.txt": ["a.txt"],
        "s3://data/**/*.jsonl": ["b.jsonl"],
    }.items():  # fmt: skip
        assert [file.name for file in find(address).files] == names
    caplog.clear()
    first = find("s3://data/texts").files
    assert not caplog.records and first[0].read_text() == "one"
    put(bucket, "s3://data/texts/a.txt", b"new and longer")
    assert find("s3://data/texts").files[0].read_text() == "new and longer"
    for gone in ("s3://data/none", "gs://other/texts/*.txt"):
        with pytest.raises(DataError, match=f"^data.paths: {gone.replace('*', '.')}: nothing there that can be read"):
            find(gone)


def test_token_shards_in_a_bucket(bucket, tmp_path):
    tokens = np.array([5, 6, 256, 7, 256], np.uint16)
    put(bucket, "gs://data/tokens/x.bin", tokens.tobytes())
    tokenizer = load_tokenizer("bytes")
    store = open_tokens("gs://data/tokens/x.bin", tokenizer, "uint16", str(tmp_path))
    assert store.read(0, 5).tolist() == tokens.tolist() and store.documents.tolist() == [0, 3, 5]
    put(bucket, "gs://data/pair/x.bin", tokens.tobytes())
    put(bucket, "gs://data/pair/x.idx", b"index")
    folder = here("gs://data/pair/x.bin", "data.paths", str(tmp_path)).parent
    assert sorted(path.name for path in folder.iterdir()) == ["x.bin", "x.idx"]


def test_what_a_service_says_is_told_in_a_line(bucket, monkeypatch):
    def deny(self, *_, **__):
        raise RuntimeError("403 Forbidden\nmore")

    monkeypatch.setattr(buckets.Bucket, "isfile", deny)
    with pytest.raises(DataError, match=r"^data\.paths: gs://data/x: 403 Forbidden$"):
        find("gs://data/x")


# Compiled programs


@pytest.mark.compiles
def test_compiled_programs_in_a_bucket(bucket, monkeypatch):
    from jax.experimental.compilation_cache import compilation_cache

    from adaptive.runs.platform import CacheHits, keep_compilations

    before = {name: getattr(jax.config, name) for name in ("jax_compilation_cache_dir",)}
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "gs://bucket/compiled")
    compilation_cache.reset_cache()
    try:
        assert keep_compilations() == "kept in gs://bucket/compiled"
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.jit(lambda x: x * 3 + 1)(jnp.ones(7)).block_until_ready()
        assert [key for key in bucket if key.startswith("/bucket/compiled/")]
        jax.clear_caches()
        with CacheHits() as hits:
            jax.jit(lambda x: x * 3 + 1)(jnp.ones(7)).block_until_ready()
        assert hits.count
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
        compilation_cache.reset_cache()
