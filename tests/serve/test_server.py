"""The server around a stand-in that adds numbers up: everything that happens between sockets and service."""

import asyncio
import contextlib
import threading
import urllib.error
import urllib.request

import numpy as np
import pytest

from benchmarks import malformed_frames
from qdepth_jax import errors
from qdepth_jax.serve import metrics, protocol

pytest.importorskip("websockets", reason="the serve extra is not installed: pip install -e '.[serve]'")
import websockets.asyncio.client as websocket
from websockets.exceptions import ConnectionClosed, InvalidStatus

from qdepth_jax.serve import server

GOOD = {"observation/image": np.ones((8, 8, 3), np.uint8), "observation/state": np.arange(7.0), "prompt": "go"}


class Service:
    """Answers with the sum of the state. `go` holds the program."""

    max_frame = 20_000

    def __init__(self):
        self.go, self.started, self.sizes = threading.Event(), threading.Event(), []
        self.go.set()

    def prepare(self, frame):
        message = protocol.unpack(frame)
        state, prompt, picture = (message.get(k) for k in ("observation/state", "prompt", "observation/image"))
        if set(message) != set(GOOD) or not isinstance(prompt, str) or not prompt:
            raise errors.UserError("keys or prompt")
        if not isinstance(picture, np.ndarray) or picture.dtype != np.uint8 or picture.shape != (8, 8, 3):
            raise errors.UserError("picture")
        if not isinstance(state, np.ndarray) or state.shape != (7,) or state.dtype != np.float64:
            raise errors.UserError("state")
        return state if np.isfinite(state).all() else "spoilt"

    def run(self, requests, size):
        self.started.set()
        self.go.wait(20)
        self.sizes.append(size)
        if any(isinstance(request, str) for request in requests):
            raise RuntimeError("device lost /secret/path")
        return [{"actions": np.full((2, 7), request.sum(), np.float32)} for request in requests]

    def metadata(self):
        return {"server": "stand-in", "horizon": 2}


def serve(scenario, **options):
    """Runs `scenario(port, server, service)` beside a server; both end well."""
    service = Service()

    async def everything():
        found = server.PolicyServer(service, server.ServerOptions(port=0, **({"drain_s": 5.0} | options)))
        port = asyncio.get_running_loop().create_future()
        life = asyncio.ensure_future(found.run(port.set_result))
        try:
            await asyncio.wait({life, port}, return_when=asyncio.FIRST_COMPLETED)
            return await asyncio.wait_for(scenario(port.result(), found, service), 60)
        finally:
            service.go.set()
            found.stop()
            await asyncio.wait_for(life, 30)

    return asyncio.run(everything()), service


@contextlib.asynccontextmanager
async def client(port, **options):
    async with websocket.connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None, **options) as connection:
        assert protocol.unpack(await connection.recv()) == {"server": "stand-in", "horizon": 2}
        yield connection


async def ask(connection, **changes):
    await connection.send(protocol.pack(GOOD | changes))
    return protocol.unpack(await connection.recv())


async def get(port, path):
    def fetch():
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    return await asyncio.to_thread(fetch)


def test_answers_with_timing_and_counts():
    async def scenario(port, found, service):
        async with client(port) as connection:
            first, second = await ask(connection), await ask(connection, **{"observation/state": np.ones(7)})
        np.testing.assert_array_equal(first["actions"], np.full((2, 7), 21, np.float32))
        np.testing.assert_array_equal(second["actions"], np.full((2, 7), 7, np.float32))
        assert first["policy_timing"]["infer_ms"] >= 0 and "prev_total_ms" not in first["server_timing"]
        assert second["server_timing"]["prev_total_ms"] >= first["policy_timing"]["infer_ms"]
        assert await get(port, "/healthz") == (200, "OK\n")
        status, text = await get(port, "/metrics")
        assert status == 200 and 'qdepth_requests_total{outcome="ok"} 2\n' in text
        assert (await get(port, "/"))[0] == 426  # no page, a websocket
        assert found.metrics.value("connections_total", "open") == 1

    serve(scenario)


def test_robots_share_a_run_and_get_their_own_answers():
    async def scenario(port, found, service):
        async with contextlib.AsyncExitStack() as stack:
            robots = [await stack.enter_async_context(client(port)) for _ in range(4)]
            answers = await asyncio.gather(
                *(ask(robot, **{"observation/state": np.full(7, float(i))}) for i, robot in enumerate(robots))
            )
        assert [a["actions"][0, 0] for a in answers] == [0, 7, 14, 21]
        assert all(a["server_timing"]["batch"] == 4 for a in answers)

    _, service = serve(scenario, deadline_s=10.0)
    assert service.sizes == [4]


def test_a_failure_is_told_to_its_client_only_and_without_a_traceback():
    async def scenario(port, found, service):
        async with client(port) as good, client(port) as bad, client(port) as text:
            replies = asyncio.gather(
                ask(good), bad.send(protocol.pack(GOOD | {"observation/state": np.full(7, np.inf)}))
            )
            message = await bad.recv()
            assert message == "the server failed: RuntimeError: device lost /secret/path"
            with pytest.raises(ConnectionClosed) as closed:
                await bad.recv()
            assert closed.value.rcvd.code == 1011
            assert (await replies)[0]["actions"][0, 0] == 21
            await text.send("hello")
            assert "text frame" in await text.recv()
            with pytest.raises(ConnectionClosed) as closed:
                await text.recv()
            assert closed.value.rcvd.code == 1008
            async with client(port) as large:
                with pytest.raises(ConnectionClosed) as closed:
                    await large.send(bytes(service.max_frame + 1))
                    await large.recv()
            assert closed.value.rcvd.code == 1009
            assert (await ask(good))["actions"][0, 0] == 21
        assert found.metrics.value("requests_total", "error") == 1
        assert found.metrics.value("requests_total", "bad_request") == 2

    serve(scenario, deadline_s=10.0, batch_sizes=(1, 2))


def test_api_key_and_number_of_connections():
    async def scenario(port, found, service):
        for header in ({}, {"Authorization": "Api-Key wrong"}, {"Authorization": "Api-Key söt"}):
            with pytest.raises(InvalidStatus) as refused:
                async with client(port, additional_headers=header):
                    pass
            assert refused.value.response.status_code == 401
        key = {"Authorization": "Api-Key right"}
        async with client(port, additional_headers=key) as one, client(port, additional_headers=key):
            with pytest.raises(InvalidStatus) as refused:
                async with client(port, additional_headers=key):
                    pass
            assert refused.value.response.status_code == 503
            assert (await ask(one))["actions"][0, 0] == 21
        assert (await get(port, "/healthz"))[0] == 200  # probes have no key
        assert found.metrics.value("connections_total", "unauthorised") == 3
        assert found.metrics.value("connections_total", "full") == 1

    serve(scenario, api_key="right", max_connections=2)


def test_the_end_finishes_what_is_in_flight():
    async def scenario(port, found, service):
        async with client(port) as busy, client(port) as idle, client(port) as late:
            service.go.clear()
            answer = asyncio.ensure_future(ask(busy))
            await asyncio.to_thread(service.started.wait, 20)
            found.stop()
            with pytest.raises(ConnectionClosed) as closed:
                await idle.recv()
            assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1001, "server is stopping")
            with pytest.raises(ConnectionClosed) as closed:
                await late.send(protocol.pack(GOOD))
                await late.recv()
            assert closed.value.rcvd.reason == "server is stopping"
            with pytest.raises((OSError, InvalidStatus)):
                async with client(port):
                    pass
            assert not answer.done()
            service.go.set()
            assert (await answer)["actions"][0, 0] == 21
            with pytest.raises(ConnectionClosed) as closed:
                await busy.recv()
            assert closed.value.rcvd.reason == "server is stopping"

    serve(scenario)


def test_nothing_is_planned_for_a_robot_that_has_gone():
    async def scenario(port, found, service):
        async with client(port) as first, client(port) as stays:
            service.go.clear()
            held = asyncio.ensure_future(ask(first))
            await asyncio.to_thread(service.started.wait, 20)
            async with client(port) as gone:
                await gone.send(protocol.pack(GOOD))
                while len(found._busy) < 2:
                    await asyncio.sleep(0.01)
            while found.metrics.value("connections") > 2:  # known although the program runs
                await asyncio.sleep(0.01)
            other = asyncio.ensure_future(ask(stays))
            while len(found._busy) < 2:
                await asyncio.sleep(0.01)
            service.go.set()
            assert [(await reply)["actions"][0, 0] for reply in (held, other)] == [21, 21]
        assert found.metrics.value("requests_total", "gone") == 1
        assert found.metrics.value("rows_total", "planned") == 2

    serve(scenario, deadline_s=0.0)


def test_an_address_in_use_is_a_plain_error():
    async def scenario(port, found, service):
        again = server.PolicyServer(service, server.ServerOptions(port=port))
        with pytest.raises(errors.UserError, match=f"cannot listen on 127.0.0.1:{port}"):
            await again.run()
        # Asked beforehand, as the command does it before it compiles.
        with pytest.raises(errors.UserError, match=f"cannot listen on 127.0.0.1:{port}: .*another --port"):
            await asyncio.to_thread(server.check_address, server.ServerOptions(port=port))
        await asyncio.to_thread(server.check_address, server.ServerOptions(port=0))

    serve(scenario)


async def throw(port, frame):
    """One malformed frame on a connection of its own; the kind of end it met."""
    async with client(port) as connection:
        try:
            await connection.send(frame)
            reply = await connection.recv()
        except ConnectionClosed as error:
            return error.rcvd.code if error.rcvd else None
        if not isinstance(reply, str):
            return "answered"
        with pytest.raises(ConnectionClosed) as closed:
            await connection.recv()
        assert reply.startswith("bad request: ") and len(reply) < 600
        return closed.value.rcvd.code


async def fuzz(port, count, seed):
    """Ends of `count` malformed frames by kind of end, with a good client working beside them; its answers."""
    ends, answers = {}, 0
    async with client(port) as good:
        for number, (kind, frame) in enumerate(malformed_frames.frames(count, seed, GOOD)):
            end = await throw(port, frame)
            ends.setdefault(end, set()).add(kind)
            if number % 20 == 0:
                assert (await ask(good))["actions"][0, 0] == 21
                answers += 1
    return ends, answers


def test_malformed_frames_hurt_nobody_else():
    async def scenario(port, found, service):
        ends, answers = await fuzz(port, 240, 1)
        assert ends.keys() <= {1008, 1009} and answers == 12, ends
        assert found.metrics.value("connections") <= 1

    serve(scenario)


@pytest.mark.slow
def test_memory_stays_flat_under_malformed_frames():
    async def scenario(port, found, service):
        await fuzz(port, 300, 2)
        before = metrics.resident_bytes()
        ends, _ = await fuzz(port, 1200, 3)
        assert ends.keys() <= {1008, 1009}, ends
        assert metrics.resident_bytes() - before < 16 << 20

    serve(scenario)
