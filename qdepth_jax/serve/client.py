"""openpi-client that survives a restart of the server. Needs openpi-client alone: copy this file onto the robot.

    policy = ReconnectingPolicy("10.0.0.7", 8000)
    chunk = policy.infer(observation)["actions"]

A request that the connection took with it is sent again, as it was: planning changes nothing on the server. After a
long outage the picture in it is old, so `infer` gives up after `patience_s`, and `last_outage_s` says how old the
observation had become, from the call to its answer (0 if nothing failed). What the server refuses (RuntimeError with
its message) is never sent again.
"""

import contextlib
import socket
import threading
import time

import websockets.exceptions
import websockets.sync.client
from openpi_client import base_policy, msgpack_numpy, websocket_client_policy

# What is no accident of the network: asking again does not help.
_FINAL = (400, 401, 403, 404, 426)

# A connection that is not open after so many seconds is tried again.
_OPEN_S = 10.0

# Metadata that say what a request and its answer mean. The rest (batch sizes, real-time chunking, depth, limits) is how
# the server was started: a request for what it lacks is refused with the reason.
_MEANING = ("model", "dataset", "observation", "horizon", "action_dim", "actions", "flow")


class ServerChanged(RuntimeError):
    """The server came back with another model."""


class ReconnectingPolicy(base_policy.BasePolicy):
    """openpi_client's WebsocketClientPolicy with reconnection.

    Args:
      host, port, api_key: as there.
      patience_s: how long one call waits for a server and its answer. pause_s: between two attempts.
      same_model: a server that comes back with other weights, observations or actions (_MEANING) is an error.
    """

    def __init__(self, host="127.0.0.1", port=8000, api_key=None, patience_s=60.0, pause_s=0.2, same_model=True):
        self._where = (host, port, api_key)
        self._patience_s, self._pause_s, self._same_model = patience_s, pause_s, same_model
        self._client, self._metadata = None, None
        self.reconnects, self.last_outage_s = 0, 0.0
        self._try(lambda client: None)

    def get_server_metadata(self):
        return self._metadata

    def infer(self, obs):
        """As openpi's.

        Raises:
          RuntimeError: the server's answer to a bad observation. TimeoutError: no server, or a mute one, for
          `patience_s`.
          ServerChanged: see `same_model`.
        """
        return self._try(lambda client: client.infer(obs))

    def reset(self):
        pass

    def close(self):
        self._drop()

    def _try(self, call):
        began, failed = time.monotonic(), False
        deadline = began + self._patience_s
        while True:
            try:
                if self._client is None:
                    self._connect(deadline)
                with _until(deadline, self._client._ws):
                    answer = call(self._client)
                self.last_outage_s = time.monotonic() - began if failed else 0.0
                return answer
            except ServerChanged:
                raise
            except RuntimeError:
                self._drop()  # the server closes after an error: the next call connects anew
                raise
            except (OSError, EOFError, websockets.exceptions.WebSocketException) as error:
                self._drop()
                status = getattr(getattr(error, "response", None), "status_code", None)
                # 1008 and 1009: the server refused this very frame.
                code = getattr(getattr(error, "rcvd", None), "code", None)
                if status in _FINAL or code in (1008, 1009):
                    raise
                failed = True
                if _left(deadline) <= self._pause_s:  # too late for another attempt
                    where, waited = "{}:{}".format(*self._where), f"{self._patience_s:g} s"
                    raise TimeoutError(
                        f"no answer from a policy server at {where} for {waited} ({type(error).__name__}: {error})"
                    ) from error
                time.sleep(self._pause_s)

    def _connect(self, deadline):
        client = _Client(deadline, *self._where)
        metadata = client.get_server_metadata()
        if self._metadata is not None:
            self.reconnects += 1
            before, now = _meaning(self._metadata), _meaning(metadata)
            changed = [key for key in _MEANING if now[key] != before[key]]
            if self._same_model and changed:
                client._ws.close()
                raise ServerChanged("the server came back with other " + ", ".join(changed))
        self._client, self._metadata = client, metadata

    def _drop(self):
        client, self._client = self._client, None
        if client is not None:
            client._ws.close()  # openpi-client has no method for it


class _Client(websocket_client_policy.WebsocketClientPolicy):
    """openpi's, which by itself asks a closed port and listens to a mute server for ever."""

    def __init__(self, deadline, *where):
        self._deadline = deadline
        super().__init__(*where)

    def _wait_for_server(self):
        connection = websockets.sync.client.connect(
            self._uri,
            compression=None,
            max_size=None,
            additional_headers={"Authorization": f"Api-Key {self._api_key}"} if self._api_key else None,
            open_timeout=min(_OPEN_S, _left(self._deadline)),
        )
        with _until(self._deadline, connection):
            return connection, msgpack_numpy.unpackb(connection.recv())


@contextlib.contextmanager
def _until(deadline, connection):
    """Ends the connection at the deadline, whatever it waits for: sending has no timeout of its own."""

    def end():
        with contextlib.suppress(OSError):  # it has ended already
            connection.socket.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(min(_left(deadline), threading.TIMEOUT_MAX), end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _left(deadline):
    return max(0.0, deadline - time.monotonic())


def _meaning(metadata):
    found = {key: metadata.get(key) for key in _MEANING}
    # The one limit that stands beside what a picture is.
    seen = (found["observation"] or {}).items()
    limited = {key: {name: x for name, x in entry.items() if name != "max_side"} for key, entry in seen}
    return found | {"observation": limited}
