"""A fake of Google Cloud Storage on the loopback device: the few requests of the JSON API that reading needs.

What it imitates (status codes, headers, forms of answers) follows the public API documentation; it is no proof of how
the real service behaves. The client side is real: TensorStore's own gcs driver, pointed here by
TENSORSTORE_GCS_HTTP_URL. TensorStore reads that variable once per process, so `serve` comes first, in a process of its
own.
"""

import http.server
import json
import os
import socket
import threading
import time
import urllib.parse


class FakeGcs:
    """`objects` maps "bucket/key" to bytes; `status` maps a bucket to the code it answers with ("hang" = never).

    `most_at_once` counts requests that were open at the same time; `hold` = n keeps range requests back until n of them
    are here, or half a second: over HTTP/1.1 the client opens further connections only while answers come in.
    """

    def __init__(self, objects: dict[str, bytes]):
        self.objects = dict(objects)
        self.generations = dict.fromkeys(objects, 1)
        self.status: dict[str, int | str] = {}
        self.requests: list[tuple[str, str]] = []
        self.hold = 0
        self.most_at_once = self._open = 0
        self._changed = threading.Condition()

    def put(self, name: str, data: bytes) -> None:
        self.objects[name] = data
        self.generations[name] = self.generations.get(name, 0) + 1

    def answer(self, path: str, wanted: str | None) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body) for a GET of `path` with the Range header `wanted`."""
        url = urllib.parse.urlparse(path)
        query = urllib.parse.parse_qs(url.query)
        bucket, _, rest = url.path.removeprefix("/storage/v1/b/").partition("/")
        self.requests.append((path, wanted or ""))
        status = self.status.get(bucket)
        if status == "hang":
            time.sleep(3600)
        if status:
            return int(status), {}, json.dumps({"error": {"code": status, "message": f"fake {status}"}}).encode()
        if rest == "o":
            return self._list(bucket, query)
        name = f"{bucket}/{urllib.parse.unquote(rest.removeprefix('o/'))}"
        if name not in self.objects:
            return 404, {}, b"{}"
        data, generation = self.objects[name], str(self.generations[name])
        if query["alt"] == ["json"]:
            return 200, {}, json.dumps({"name": name, "size": str(len(data)), "generation": generation}).encode()
        headers = {"x-goog-generation": generation, "x-goog-stored-content-length": str(len(data))}
        if not wanted:
            return 200, headers, data
        low, _, high = wanted.removeprefix("bytes=").partition("-")
        first, last = int(low), min(int(high or len(data)), len(data) - 1)
        if first >= len(data):
            return 416, {"Content-Range": f"bytes */{len(data)}"}, b""
        return 206, {**headers, "Content-Range": f"bytes {first}-{last}/{len(data)}"}, data[first : last + 1]

    def _list(self, bucket: str, query: dict[str, list[str]]) -> tuple[int, dict[str, str], bytes]:
        low, high = query.get("startOffset", [""])[0], query.get("endOffset", ["\U0010ffff"])[0]
        keys = [name.partition("/")[2] for name in self.objects if name.partition("/")[0] == bucket]
        items = [{"name": key, "generation": "1", "size": "1"} for key in sorted(keys) if low <= key < high]
        return 200, {}, json.dumps({"items": items}).encode()

    def enter(self, is_range: bool) -> None:
        with self._changed:
            self._open += 1
            self.most_at_once = max(self.most_at_once, self._open)
            self._changed.notify_all()
            if is_range and self.hold:
                self._changed.wait_for(lambda: self.most_at_once >= self.hold, timeout=0.5)

    def leave(self) -> None:
        with self._changed:
            self._open -= 1


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256


def serve(objects: dict[str, bytes]) -> FakeGcs:
    """Starts the fake and points TensorStore at it."""
    fake = FakeGcs(objects)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self):
            super().setup()
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def do_GET(self):
            wanted = self.headers.get("Range")
            fake.enter(wanted is not None)
            try:
                status, headers, body = fake.answer(self.path, wanted)
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)
            finally:
                fake.leave()

        def log_message(self, *_):
            pass

    server = _Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ["TENSORSTORE_GCS_HTTP_URL"] = f"http://127.0.0.1:{server.server_port}"
    # No credentials, and no metadata server that would be asked for them.
    os.environ["GCE_METADATA_ROOT"] = "127.0.0.1:1"
    os.environ["HOME"] = "/nonexistent"
    os.environ.pop("GOOGLE_APPLICATION_CREDENTIALS", None)
    return fake
