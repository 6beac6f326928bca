"""Buckets for tests: gs:// and s3:// as fsspec's memory, and a server that shows gs:// to TensorStore as Google does.

TensorStore, with which Orbax writes arrays, has its own client for gs://; everything else goes through fsspec, whose
packages gcsfs and s3fs stand in for here. Both see the same objects.
"""

import contextlib
import email.parser
import http.server
import json
import sys
import threading
import types
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from urllib.parse import parse_qs, unquote, urlsplit

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class Bucket(MemoryFileSystem):
    """Objects by bucket and name; folders are what names have in common, and nothing is renamed in place."""

    store: dict = {}  # noqa: RUF012  # shared by all
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        for scheme in ("gs://", "gcs://", "s3://"):
            path = path.removeprefix(scheme)
        return "/" + path.strip("/") if path.strip("/") else ""

    def mkdir(self, path, create_parents=True, **kwargs):
        pass

    def makedirs(self, path, exist_ok=False):
        pass


class Handler(http.server.BaseHTTPRequestHandler):
    """What TensorStore asks of Google's JSON API: objects are read, written, listed and deleted."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        bucket, name = self._named(url.path)
        store = Bucket.store
        if name is None:
            prefix = f"/{bucket}/"
            names = sorted(
                key.removeprefix(prefix) for key in store if key.startswith(prefix + query.get("prefix", ""))
            )
            return self._json({"items": [{"name": each, "generation": "1"} for each in names]})
        held = store.get(f"/{bucket}/{name}")
        if held is None:
            return self._json({"error": {"code": 404}}, 404)
        content = held.getvalue()
        if query.get("alt") != "media":
            return self._json({"name": name, "size": str(len(content)), "generation": str(_generation(content))})
        status, whole = 200, len(content)
        if asked := self.headers.get("Range"):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            status, content = 206, content[int(first) : int(last) + 1 if last else None]
        self.send_response(status)
        self.send_header("x-goog-generation", str(_generation(held.getvalue())))
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(content) - 1}/{whole}")
        self._content(content)

    def do_POST(self):
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        bucket, _ = self._named(url.path.removeprefix("/upload"))
        if query.get("uploadType") == "multipart":
            head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
            _, part = email.parser.BytesParser().parsebytes(head + content).get_payload()
            content = part.get_payload(decode=True)
        key, asked = f"/{bucket}/{query['name']}", query.get("ifGenerationMatch")
        held = Bucket.store.get(key)
        if asked is not None and int(asked) != (_generation(held.getvalue()) if held else 0):
            return self._json({"error": {"code": 412}}, 412)
        Bucket().pipe_file(key, content)
        return self._json({"name": query["name"], "size": str(len(content)), "generation": str(_generation(content))})

    def do_DELETE(self):
        bucket, name = self._named(urlsplit(self.path).path)
        Bucket.store.pop(f"/{bucket}/{name}", None)
        self.send_response(204)
        self._content(b"")

    def _named(self, path: str) -> tuple[str, str | None]:
        parts = path.split("/b/", 1)[1].split("/")
        return parts[0], unquote(parts[2]) if len(parts) > 2 and parts[2] else None

    def _json(self, told, status=200):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self._content(json.dumps(told).encode())

    def _content(self, content: bytes):
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def _generation(content: bytes) -> int:
    return hash(content) % 10**9 + 1


@contextlib.contextmanager
def opened(monkeypatch) -> Iterator[dict]:
    """While the block runs, gs:// and s3:// lead to the objects that are given: {"/bucket/name": file}."""
    from etils.epath import backend

    Bucket.store.clear()
    Bucket.pseudo_dirs[:] = [""]
    for scheme in ("gs", "gcs", "s3"):
        fsspec.register_implementation(scheme, Bucket, clobber=True)
    backend.fsspec_backend._get_filesystem.cache_clear()
    for package in ("gcsfs", "s3fs"):
        module = types.ModuleType(package)
        module.__spec__ = ModuleSpec(package, None)
        monkeypatch.setitem(sys.modules, package, module)
    google = types.ModuleType("google.cloud.storage")  # Orbax asks it about the bucket before it deletes
    google.Client = lambda: types.SimpleNamespace(get_bucket=lambda name: types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "google.cloud.storage", google)
    cloud = types.ModuleType("google.cloud")
    cloud.storage = google
    monkeypatch.setitem(sys.modules, "google.cloud", cloud)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
    try:
        yield Bucket.store
    finally:
        server.shutdown()
        server.server_close()
        backend.fsspec_backend._get_filesystem.cache_clear()
