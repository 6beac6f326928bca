"""Data in a bucket, copied to the cache folder: it is read in places, mapped into memory, and read again at each start.

A copy stands under a name made of what it is a copy of and of its files' sizes and versions, so that files that were
changed in the bucket are copied anew.
"""

import concurrent.futures
import logging
import shutil
import time
from pathlib import Path
from typing import Any

from adaptive.data import compressed
from adaptive.data.files import ELSEWHERE, beside, cache_dir, digest, explained
from adaptive.errors import DataError
from adaptive.paths import bucket_path, bucket_scheme, local_path

_AT_ONCE = 8
_KINDS = (".txt", ".md", ".jsonl", ".ndjson", ".json", ".parquet", ".bin", ".idx", ".npy")
_VERSION = ("generation", "etag", "ETag", "VersionId", "LastModified", "mtime", "created")
_ABANDONED_AFTER_S = 7 * 24 * 3600.0

log = logging.getLogger("adaptive.data")


def here(text: str, option: str, cache: str = "") -> Path:
    """The path on this machine that `text` means; of a file, a folder or a glob in a bucket, that of a copy.

    Raises UserError for what is no path, DataError for what is not there or cannot be read.
    """
    if not bucket_scheme(text):
        return local_path(text, option)
    address = str(bucket_path(text, option))
    try:
        return _copied(address, option, cache)
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{option}: {text}: {error.strerror or error}") from None
    except Exception as error:  # of the service's own kinds: no permission, no such bucket, no network
        raise DataError(f"{option}: {text}: {(str(error) or type(error).__name__).splitlines()[0][:200]}") from None


def _copied(address: str, option: str, cache: str) -> Path:
    import fsspec

    system: Any = fsspec.filesystem(bucket_scheme(address))
    one = not any(mark in address for mark in "*?[") and system.isfile(address)
    files = _of_file(system, address) if one else _below(system, address)
    if not files:
        raise DataError(f"{option}: {address}: nothing there that can be read")
    key = digest([address, sorted((name, about) for name, (_, about) in files.items())])[:24]
    folder = cache_dir(cache) / "fetched" / key
    if not folder.exists():
        with explained(f"copying {address}", ELSEWHERE):
            _copy(system, address, files, folder)
    return folder / address.rsplit("/", 1)[1] if one else folder


Files = dict[str, tuple[str, list[str]]]  # by the name below the folder: the name in the bucket, size and version


def _of_file(system: Any, address: str) -> Files:
    names = [address]
    if address.endswith(".bin") and system.isfile(index := f"{address.removesuffix('.bin')}.idx"):
        names.append(index)  # of Megatron-LM
    return {name.rsplit("/", 1)[1]: (name, _identity(system.info(name))) for name in names}


def _below(system: Any, address: str) -> Files:
    """Files of the kinds that are read, below a folder or matched by a glob; what is hidden is left out."""
    glob = any(mark in address for mark in "*?[")
    found = system.glob(address, detail=True) if glob else system.find(address, detail=True)
    fixed = address.split("*")[0].split("?")[0].split("[")[0].rsplit("/", 1)[0] if glob else address
    root = system._strip_protocol(fixed).rstrip("/") + "/"
    suffixes = tuple(kind + packing for kind in _KINDS for packing in ("", *compressed.SUFFIXES))
    files = {}
    for name, about in found.items():
        below = name.removeprefix(root)
        hidden = any(part.startswith(".") for part in below.split("/"))
        if about.get("type") != "directory" and not hidden and below.lower().endswith(suffixes):
            files[below] = (name, _identity(about))
    return files


def _identity(about: dict[str, Any]) -> list[str]:
    version = next((str(about[key]) for key in _VERSION if about.get(key)), "")
    return [str(about.get("size")), version]


def _copy(system: Any, address: str, files: Files, folder: Path) -> None:
    """Of several processes that copy the same, the first to finish wins and the others use its copy."""
    size = sum(int(about[0]) for _, about in files.values() if about[0].isdigit())
    log.info("copying %s: %s file(s), %.1f MB", address, len(files), size / 1e6)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder.parent)
    part = beside(folder)
    try:
        for name in files:
            (part / name).parent.mkdir(parents=True, exist_ok=True)
        with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
            jobs = [pool.submit(system.get_file, name, str(part / below)) for below, (name, _) in files.items()]
            for job in jobs:
                job.result()
        try:
            part.rename(folder)
        except OSError:
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    """Removes what was left by processes that were killed while they copied."""
    for path in folder.glob(".*.tmp"):
        if time.time() - path.stat().st_mtime > _ABANDONED_AFTER_S:
            shutil.rmtree(path, ignore_errors=True)
