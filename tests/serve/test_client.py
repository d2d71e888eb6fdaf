"""The client that reconnects, around a stand-in of openpi-client: which restarts of the server it goes on after."""

import base64
import contextlib
import hashlib
import importlib
import json
import socket
import sys
import threading
import types

import pytest

METADATA = {
    "model": {"kind": "policy", "identity": "a" * 16, "step": 7},
    "dataset": "libero_object",
    "observation": {"observation/image": {"view": "main", "max_side": 1024}, "prompt": {"max_tokens": 24}},
    "horizon": 4,
    "action_dim": 7,
    "actions": {"shape": [4, 7], "meaning": "LIBERO's"},
    "flow": {"steps": 10, "solver": "euler"},
    "rtc": "inpaint",
    "batch_sizes": [1, 2, 4, 8],
    "depth": {"kind": "metric"},
}


class Server:
    """What answers at the address: its metadata, and whether the next request loses its connection."""

    def __init__(self):
        self.metadata, self.lost, self.connections = METADATA, False, []

    def connect(self, host, port, api_key):
        self.connections.append(Connection(self))
        return self.connections[-1]


class Connection:
    """openpi_client's WebsocketClientPolicy."""

    def __init__(self, server):
        self.server, self.metadata, self.open = server, server.metadata, True
        self._ws = types.SimpleNamespace(close=self.close)

    def close(self):
        self.open = False

    def get_server_metadata(self):
        return self.metadata

    def infer(self, observation):
        if self.server.lost:
            self.server.lost = False
            raise ConnectionError("gone")
        return {"actions": observation}


class Waiting:
    """openpi_client's WebsocketClientPolicy; its own way to a server, which has no end, is not to be taken."""

    def __init__(self, host, port, api_key):
        self._uri, self._api_key = f"ws://{host}:{port}", api_key
        self._ws, self._server_metadata = self._wait_for_server()

    def _wait_for_server(self):
        pytest.fail("it waits for ever")

    def get_server_metadata(self):
        return self._server_metadata

    def infer(self, observation):
        self._ws.send(observation)
        return self._ws.recv()


WEBSOCKETS = {
    "websockets": {},
    "websockets.exceptions": {"WebSocketException": type("WebSocketException", (Exception,), {})},
    "websockets.sync": {},
    "websockets.sync.client": {},
}
OPENPI_CLIENT = {
    "openpi_client": {},
    "openpi_client.base_policy": {"BasePolicy": object},
    "openpi_client.msgpack_numpy": {"unpackb": json.loads},
    "openpi_client.websocket_client_policy": {"WebsocketClientPolicy": Waiting},
}


@pytest.fixture
def client(monkeypatch, request):
    """The module with stand-ins of its two packages, or, if asked for "real", of the second alone."""
    names = OPENPI_CLIENT if getattr(request, "param", "") == "real" else WEBSOCKETS | OPENPI_CLIENT
    if names is OPENPI_CLIENT:
        pytest.importorskip("websockets", reason="the serve extra is not installed")
    for name, content in names.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    monkeypatch.delitem(sys.modules, "qdepth_jax.serve.client", raising=False)
    found = importlib.import_module("qdepth_jax.serve.client")
    yield found
    sys.modules.pop("qdepth_jax.serve.client")


@pytest.fixture
def robot(client, monkeypatch):
    """(a policy that is connected, its server)"""
    server = Server()
    monkeypatch.setattr(client, "_Client", lambda deadline, *where: server.connect(*where))
    return client.ReconnectingPolicy(pause_s=0.0), server


def restarted(**changes):
    picture = METADATA["observation"]["observation/image"] | {"max_side": 512}
    same = METADATA | {"observation": METADATA["observation"] | {"observation/image": picture}}
    return same | {"batch_sizes": [1], "rtc": "off", "depth": {}, "version": "9", "max_frame_bytes": 1} | changes


def test_the_age_of_an_observation_counts_from_the_call(client, robot, monkeypatch):
    policy, server = robot
    now = [100.0]
    monkeypatch.setattr(client.time, "monotonic", lambda: now[0])

    def lost_after_a_while(connection, observation):
        if server.lost:
            server.lost = False
            now[0] += 40.0  # a host without power: the connection notices late
            raise ConnectionError("gone")
        return observation

    monkeypatch.setattr(Connection, "infer", lost_after_a_while)
    server.lost = True
    assert policy.infer(3) == 3 and policy.last_outage_s == 40.0
    assert policy.infer(3) == 3 and policy.last_outage_s == 0.0


def test_other_options_of_the_same_model_are_no_other_server(robot):
    policy, server = robot
    server.metadata, server.lost = restarted(), True
    assert policy.infer(3)["actions"] == 3 and policy.reconnects == 1
    assert policy.get_server_metadata()["batch_sizes"] == [1]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", METADATA["model"] | {"identity": "b" * 16}),
        ("observation", {"observation/wrist_image": {"view": "wrist"}}),
        ("actions", {"shape": [4, 7], "meaning": "standard"}),
        ("horizon", 8),
    ],
)
def test_what_makes_a_request_mean_something_else_ends_it(client, robot, key, value):
    policy, server = robot
    server.metadata, server.lost = restarted(**{key: value}), True
    for _ in range(2):  # and it stays so
        with pytest.raises(client.ServerChanged, match=f"other {key}$"):
            policy.infer(3)
    assert len(server.connections) == 3 and not any(connection.open for connection in server.connections)


@contextlib.contextmanager
def falls_silent(after):
    """The port of a server that goes on for so many of its steps: accept, handshake, metadata."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

        def live():
            with contextlib.suppress(OSError):
                while True:
                    robot, request = stack.enter_context(server.accept()[0]), b""
                    while after and not request.endswith(b"\r\n\r\n"):
                        request += robot.recv(1)
                    if after:
                        key = request.partition(b"Sec-WebSocket-Key: ")[2].partition(b"\r\n")[0]
                        accepted = base64.b64encode(
                            hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()
                        )
                        robot.sendall(
                            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                            b"Sec-WebSocket-Accept: " + accepted + b"\r\n\r\n"
                        )
                    if after > 1:
                        robot.sendall(b"\x81\x02{}")

        threading.Thread(target=live, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("client", ["real"], indirect=True)
@pytest.mark.parametrize("after", [None, 0, 1, 2])
def test_a_server_that_is_gone_or_mute_is_waited_for_no_longer_than_told(client, after):
    """Also where it takes no more of a request than the network holds back for it."""
    message = r"no answer from a policy server at 127\.0\.0\.1:\d+ for 0\.3 s \(\w+: "
    with falls_silent(after or 0) as port:
        if after is None:
            with socket.create_server(("127.0.0.1", 0)) as nobody:
                port = nobody.getsockname()[1]
        if after != 2:
            with pytest.raises(TimeoutError, match=message):
                client.ReconnectingPolicy(port=port, patience_s=0.3)
            return
        policy = client.ReconnectingPolicy(port=port)
        policy._patience_s = 0.3
        for size in (1 << 26, 1):
            with pytest.raises(TimeoutError, match=message):
                policy.infer(bytes(size))
