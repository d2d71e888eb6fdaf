"""openpi's websocket protocol around a service: one event loop for the robots, two threads for the work.

A client gets one frame of metadata; then it sends an observation at a time and gets an answer for each. What is wrong
is told as openpi tells it, by a text frame, after which the connection is closed: 1008 if the request was wrong, 1011
if the server was; 1009 for frames over the limit, 1001 "server is stopping". GET /healthz and GET /metrics are HTTP.

SIGTERM and SIGINT end it gracefully: it stops listening, answers what is in flight, closes idle connections with a
reason, and returns.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import hmac
import http
import logging
import math
import signal
import time
from collections.abc import Callable
from typing import Any, Protocol

import websockets.asyncio.server
from websockets.exceptions import ConnectionClosed

from qdepth_jax import errors
from qdepth_jax.serve import batching, protocol
from qdepth_jax.serve import metrics as metrics_lib

BAD_REQUEST, TOO_BIG, FAILED, STOPPING = 1008, 1009, 1011, 1001  # close codes of RFC 6455
HANDSHAKE_S = 5.0  # for whoever connects and says nothing; the end waits for them too
_LOG = logging.getLogger("qdepth_jax.serve")


class Served(Protocol):
    """What is served: policy_service.Service, or a stand-in in tests."""

    max_frame: int

    def prepare(self, frame: bytes) -> Any: ...
    def run(self, requests: list[Any], size: int) -> list[dict[str, Any]]: ...
    def metadata(self) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class ServerOptions:
    """Attributes:
    port: 0 takes a free one. api_key: "" = everybody may come in.
    batch_sizes: as the service compiled them. deadline_s: a request waits no longer for others.
    max_connections: more are refused. drain_s: how long the end waits for what is in flight.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str = ""
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8)
    deadline_s: float = 0.005
    max_connections: int = 64
    drain_s: float = 30.0

    def __post_init__(self):
        if not 0 <= self.port < 65536:
            raise errors.UserError(f"--port={self.port}: 0 (a free one) to 65535")
        for flag, value in (("deadline_ms", 1e3 * self.deadline_s), ("drain_s", self.drain_s)):
            if not 0 <= value < math.inf:  # false for NaN too
                raise errors.UserError(f"--{flag}={value:g} must be 0 or more, and finite")
        if self.max_connections < 1:
            raise errors.UserError(f"--max_connections={self.max_connections} must be 1 or more")


def check_address(options: ServerOptions) -> None:
    """Takes the address and lets it go again: a taken port is known before minutes are spent on compiling.

    Raises:
      UserError: it cannot be had.
    """

    async def take() -> None:
        loop = asyncio.get_running_loop()
        (await loop.create_server(asyncio.Protocol, options.host, options.port, start_serving=False)).close()

    try:
        asyncio.run(take())
    except OSError as error:
        raise _cannot_listen(options, error) from error


def _cannot_listen(options: ServerOptions, error: OSError) -> errors.UserError:
    return errors.UserError(
        f"cannot listen on {options.host}:{options.port}: {error.strerror}; choose another --port (0 = a free one) or "
        "--host"
    )


class PolicyServer:
    """One server; `run` is its life."""

    def __init__(self, service: Served, options: ServerOptions):
        self._service, self._options = service, options
        self.metrics = metrics_lib.Metrics()
        self._hello = protocol.pack(service.metadata())
        self._open: set[websockets.asyncio.server.ServerConnection] = set()
        self._busy: set[websockets.asyncio.server.ServerConnection] = set()
        self._stop = asyncio.Event()
        # Not the batcher's thread: a request is decoded and its pictures resized while the program runs for others.
        self._reading = concurrent.futures.ThreadPoolExecutor(1, "prepare")
        self._batcher = batching.Batcher(
            service.run, options.batch_sizes, options.deadline_s, lambda: len(self._open), self.metrics
        )

    def stop(self) -> None:
        """Begins the graceful end. In the event loop's thread."""
        self._stop.set()

    async def run(self, ready: Callable[[int], None] = lambda port: None, signals: bool = False) -> None:
        """Serves until `stop` or, with `signals`, SIGTERM or SIGINT.

        Args:
          ready: told the port when clients can connect.

        Raises:
          UserError: the address cannot be had.
        """
        options, loop = self._options, asyncio.get_running_loop()
        self._batcher.start()
        try:
            server = await websockets.asyncio.server.serve(
                self._handle, options.host, options.port, process_request=self._admit,
                compression=None, max_size=self._service.max_frame, max_queue=1, open_timeout=HANDSHAKE_S,
            )  # fmt: skip
        except OSError as error:
            await self._batcher.close()
            raise _cannot_listen(options, error) from error
        for number in (signal.SIGTERM, signal.SIGINT) if signals else ():
            loop.add_signal_handler(number, self.stop)
        try:
            ready(server.sockets[0].getsockname()[1])
            await self._stop.wait()
            await self._drain(server)
        finally:
            for number in (signal.SIGTERM, signal.SIGINT) if signals else ():
                loop.remove_signal_handler(number)
            server.close()
            await self._batcher.close()
            await server.wait_closed()
            self._reading.shutdown(wait=True, cancel_futures=True)

    async def _drain(self, server: websockets.asyncio.server.Server) -> None:
        _LOG.info("stopping: %d connections, %d requests in flight", len(self._open), len(self._busy))
        server.close(close_connections=False)
        for connection in self._open - self._busy:
            asyncio.get_running_loop().create_task(_close(connection, STOPPING, "server is stopping"))
        until = time.monotonic() + self._options.drain_s
        while self._open and time.monotonic() < until:
            await asyncio.sleep(0.01)
        if self._busy:
            _LOG.warning("gave up on %d requests after %.0f s", len(self._busy), self._options.drain_s)
        for connection in self._open:
            connection.transport.abort()

    def _admit(self, connection, request):
        """Before the handshake: plain HTTP, keys and limits."""
        path = request.path.partition("?")[0]
        if self._stop.is_set():  # only whoever had connected before: nobody listens any more
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, "server is stopping\n")
        if path == "/healthz":
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        if path == "/metrics":
            response = connection.respond(http.HTTPStatus.OK, self.metrics.text())
            del response.headers["Content-Type"]
            response.headers["Content-Type"] = "text/plain; version=0.0.4; charset=utf-8"
            return response
        if not self._authorised(request.headers.get_all("Authorization")):
            status, outcome, why = http.HTTPStatus.UNAUTHORIZED, "unauthorised", "this server needs its API key"
        elif len(self._open) >= self._options.max_connections:
            status, outcome, why = http.HTTPStatus.SERVICE_UNAVAILABLE, "full", "too many connections"
        else:
            return None
        self.metrics.add("connections_total", label=outcome)
        return connection.respond(status, why + "\n")

    def _authorised(self, headers: list[str]) -> bool:
        if not self._options.api_key:
            return True
        wanted = f"Api-Key {self._options.api_key}".encode()
        # In constant time: how long it takes must not tell how much of a guess was right.
        return len(headers) == 1 and hmac.compare_digest(headers[0].encode(errors="replace"), wanted)

    async def _handle(self, connection: websockets.asyncio.server.ServerConnection) -> None:
        self._open.add(connection)
        self.metrics.add("connections_total", label="open")
        self.metrics.put("connections", len(self._open))
        try:
            await connection.send(self._hello)
            previous = None
            while not self._stop.is_set():
                frame = await connection.recv()
                self._busy.add(connection)
                previous = await self._answer(connection, frame, previous)
                self._busy.discard(connection)
                if previous is None:
                    return
            await _close(connection, STOPPING, "server is stopping")
        except ConnectionClosed as closed:
            if closed.sent is not None and closed.sent.code == TOO_BIG:
                self.metrics.add("requests_total", label="bad_request")
        finally:
            self._busy.discard(connection)
            self._open.discard(connection)
            self.metrics.put("connections", len(self._open))

    async def _answer(self, connection, frame: bytes | str, previous: float | None) -> float | None:
        """Answers one frame; seconds it took, None = the connection is closed."""
        began = time.monotonic()
        try:
            if isinstance(frame, str):
                raise errors.UserError("requests are binary frames of msgpack, this is a text frame")
            loop = asyncio.get_running_loop()
            request = await loop.run_in_executor(self._reading, self._service.prepare, frame)
            del frame
            self.metrics.observe("prepare_seconds", prepared := time.monotonic() - began)
            done = await self._planned(connection, request)
        except ConnectionClosed:
            self.metrics.add("requests_total", label="gone")
            raise
        except errors.UserError as error:
            await self._refuse(connection, BAD_REQUEST, "bad_request", f"bad request: {error}")
            return None
        except asyncio.CancelledError:
            await self._refuse(connection, STOPPING, "stopping", "server is stopping")
            return None
        except Exception as error:
            # The traceback is for the log: a client may be a stranger.
            _LOG.exception("a request failed")
            text = f"the server failed: {type(error).__name__}: {error}"
            await self._refuse(connection, FAILED, "error", text)
            return None
        timing = {"infer_ms": done.infer_s * 1e3, "queue_ms": done.queue_s * 1e3, "prepare_ms": prepared * 1e3}
        timing["batch"] = done.batch
        if previous is not None:
            timing["prev_total_ms"] = previous * 1e3
        answer = done.result | {"policy_timing": {"infer_ms": done.infer_s * 1e3}, "server_timing": timing}
        try:
            await connection.send(protocol.pack(answer))
        except ConnectionClosed:
            self.metrics.add("requests_total", label="gone")
            raise
        took = time.monotonic() - began
        self.metrics.add("requests_total", label="ok")
        self.metrics.observe("request_seconds", took)
        return took

    async def _planned(self, connection, request: Any) -> batching.Done:
        """The batcher's answer. Raises ConnectionClosed when the robot goes: its place in the queue is free then."""
        answer = asyncio.ensure_future(self._batcher.submit(request))
        gone = asyncio.ensure_future(connection.wait_closed())
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise connection.protocol.close_exc
            return await answer
        finally:
            answer.cancel()
            gone.cancel()

    async def _refuse(self, connection, code: int, outcome: str, text: str) -> None:
        self.metrics.add("requests_total", label=outcome)
        with contextlib.suppress(ConnectionClosed):  # whom it concerns is gone, and told nobody
            await connection.send(text)
        await _close(connection, code, text)


async def _close(connection, code: int, reason: str) -> None:
    # A close frame has 125 bytes, two of them the code.
    await connection.close(code, reason.encode()[:120].decode(errors="ignore"))
