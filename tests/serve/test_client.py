"""The client that reconnects, around a stand-in of openpi-client: which restarts of the server it goes on after."""

import importlib
import sys
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


@pytest.fixture
def client(monkeypatch):
    names = {
        "websockets": {},
        "websockets.exceptions": {"WebSocketException": type("WebSocketException", (Exception,), {})},
        "openpi_client": {},
        "openpi_client.base_policy": {"BasePolicy": object},
        "openpi_client.websocket_client_policy": {"WebsocketClientPolicy": None},
    }
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
    monkeypatch.setattr(client.websocket_client_policy, "WebsocketClientPolicy", server.connect)
    return client.ReconnectingPolicy(pause_s=0.0), server


def restarted(**changes):
    picture = METADATA["observation"]["observation/image"] | {"max_side": 512}
    same = METADATA | {"observation": METADATA["observation"] | {"observation/image": picture}}
    return same | {"batch_sizes": [1], "rtc": "off", "depth": {}, "version": "9", "max_frame_bytes": 1} | changes


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
