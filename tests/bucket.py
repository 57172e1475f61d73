"""A bucket on this machine: an emulator of Google Cloud Storage, for gcsfs and TensorStore in all processes."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable, Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from types import ModuleType

import pytest

BUCKET = "gs://runs"

_awaited: dict[str, Callable[[], None]] = {}  # beginning of an object's name → what happens when one is first written


def when_written(beginning: str, action: Callable[[], None]) -> None:
    """Has the emulator call `action`, once, as TensorStore begins to write an object whose name begins like this."""
    _awaited[beginning] = action


@contextlib.contextmanager
def emulated_bucket() -> Iterator[str]:
    """Address of an empty bucket; skips where the emulator or gcsfs is not installed."""
    pytest.importorskip("gcsfs")
    server = pytest.importorskip("gcp_storage_emulator.server")
    _complete(server)
    port = _free_port()
    emulator = server.create_server("localhost", port, in_memory=True, default_bucket=BUCKET.removeprefix("gs://"))
    for name in ("gcsfs", "gcp_storage_emulator", "api"):  # they log what is not there, which is what clients ask for
        logging.getLogger(name).setLevel(logging.CRITICAL)
    emulator.start()
    try:
        with _reached_at(port):
            yield BUCKET
    finally:
        emulator.stop()


@contextlib.contextmanager
def locked_store() -> Iterator[None]:
    """A store that answers all requests with 401: no credentials."""

    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(401)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("localhost", 0), Refusing) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        with _reached_at(server.server_port):
            yield
        server.shutdown()


@contextlib.contextmanager
def _reached_at(port: int) -> Iterator[None]:
    from etils.epath import backend
    from gcsfs import GCSFileSystem

    with pytest.MonkeyPatch.context() as patch:
        for variable in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
            patch.setenv(variable, f"http://localhost:{port}")
        patch.setenv("GCE_METADATA_HOST", "localhost:1")  # TensorStore asks there for credentials first
        GCSFileSystem.clear_instance_cache()  # they hold the address of another server
        backend.fsspec_backend._get_filesystem.cache_clear()
        yield
        GCSFileSystem.clear_instance_cache()
        backend.fsspec_backend._get_filesystem.cache_clear()


def _complete(server: ModuleType) -> None:
    """Teaches the emulator what it lacks: TensorStore's generations of objects, and moving, as gcsfs renames."""
    from gcp_storage_emulator.exceptions import NotFound
    from gcp_storage_emulator.handlers import objects

    writing = Lock()

    def generation(storage, bucket, name):
        try:
            return storage.get_file_obj(bucket, name)["generation"]
        except NotFound:
            return "0"

    def get(request, response, storage, **_):
        found = generation(storage, request.params["bucket_name"], request.params["object_id"])
        if found == request.query.get("ifGenerationNotMatch", ["none"])[0]:
            response.status = HTTPStatus.NOT_MODIFIED
            return
        response["x-goog-generation"] = found
        objects.get(request, response, storage)

    def insert(request, response, storage, **_):
        name = request.query.get("name", [""])[0]
        for beginning in [each for each in _awaited if name.startswith(each)]:
            _awaited.pop(beginning)()
        with writing:
            found = generation(storage, request.params["bucket_name"], name)
            if found != request.query.get("ifGenerationMatch", [found])[0]:
                response.status = HTTPStatus.PRECONDITION_FAILED
                return
            objects.insert(request, response, storage)

    def move(request, response, storage, **_):
        request.params["dest_bucket_name"] = request.params["bucket_name"]
        objects.copy(request, response, storage)
        storage.delete_file(request.params["bucket_name"], request.params["object_id"])

    inside = r"/storage/v1/b/(?P<bucket_name>[^/]+)/o"
    routes = (
        (rf"^{inside}/(?P<object_id>.+)/moveTo/o/(?P<dest_object_id>.+)$", {"POST": move}),
        (rf"^{inside}/(?P<object_id>(?!.*/copyTo/|.*/rewriteTo/).+)$", {"GET": get, "DELETE": objects.delete}),
        (rf"^/upload{inside}$", {"POST": insert, "PUT": objects.upload_partial}),
    )
    if server.HANDLERS[0][0] != routes[0][0]:
        server.HANDLERS = (*routes, *server.HANDLERS)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]
