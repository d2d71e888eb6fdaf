"""A policy server that an unmodified openpi-client talks to.

  python tools/serve.py --checkpoint=EXPORT [--dataset=libero_object] [--host=0.0.0.0 --port=8000] [--api_key_file=FILE]

EXPORT is a folder of tools/export_checkpoint.py (or the workdir of a run); nothing else is needed. The server listens
when everything is compiled and then prints one line of JSON. GET /healthz, GET /metrics; SIGTERM finishes what is in
flight. Needs the `serve` extra. docs/serving.md has the protocol, the limits and a client that reconnects.
"""

import asyncio
import json
import logging
import os
import pathlib
import sys

from absl import flags

from qdepth_jax import command

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "an export, or the workdir of a run", required=True)
_DATASET = flags.DEFINE_string("dataset", "", "whose robot: picks the statistics; needed if it was trained on several")
_UNITS = flags.DEFINE_string("units", "", "of actions: libero or standard; default: libero for LIBERO's data sets")
_KEYS = flags.DEFINE_list("keys", [], "NAME=KEY,...: other names in observations; NAME: a view, state or prompt")
_IGNORE = flags.DEFINE_list("ignore", [], "KEY,...: clients may send these, the policy has no use for them")
_HOST = flags.DEFINE_string("host", "127.0.0.1", "address to listen on; 0.0.0.0 = every network")
_PORT = flags.DEFINE_integer("port", 8000, "0 = a free one")
_KEY_FILE = flags.DEFINE_string("api_key_file", "", "file with the key that clients must send; QDEPTH_API_KEY does too")
_BATCHES = flags.DEFINE_list("batch_sizes", ["1", "2", "4", "8"], "batches that are compiled; the last is the largest")
_DEADLINE = flags.DEFINE_float("deadline_ms", 5.0, "a request waits no longer for those of other robots")
_SIDE = flags.DEFINE_integer("max_side", 1024, "pixels of the largest picture")
_CONNECTIONS = flags.DEFINE_integer("max_connections", 64, "more are refused")
_DEPTH = flags.DEFINE_bool("depth", False, "answer with decoded depth to requests that ask for it")
_RTC = flags.DEFINE_string("rtc", "inpaint", "real-time chunking: inpaint, guided (the paper's, slower) or off")
_STEPS = flags.DEFINE_integer("flow_steps", 0, "steps from noise to actions; 0 = as the policy's config says")
_SOLVER = flags.DEFINE_string("solver", "euler", "of the flow: euler, midpoint or heun (twice the work in a step)")
_WEIGHTS = flags.DEFINE_string("weights", "float", "float, or int8: less than half of the memory; docs/inference.md")
_UNROLL = flags.DEFINE_bool("unroll", False, "cut scanned layers apart: faster programs, compiled several times slower")
_SEED = flags.DEFINE_integer("seed", 0, "of the flow noise of requests that bring none")
_DRAIN = flags.DEFINE_float("drain_s", 30.0, "SIGTERM waits so long for what is in flight")


def main(argv: list[str]) -> None:
    # Heavy imports only now: --help answers at once.
    from qdepth_jax import errors

    if len(argv) > 1:
        raise errors.UserError(f"unexpected arguments {argv[1:]}; see --help")
    try:
        from qdepth_jax.models import inference
        from qdepth_jax.serve import policy_service, server
    except ModuleNotFoundError as error:
        raise errors.UserError(f"{error.name} is missing: pip install -e '.[serve]'") from error
    sizes = _whole_numbers()
    network = server.ServerOptions(
        _HOST.value, _PORT.value, _api_key(), sizes, _DEADLINE.value / 1e3, _CONNECTIONS.value, _DRAIN.value
    )
    how = inference.Inference(_STEPS.value, _SOLVER.value, _WEIGHTS.value, _UNROLL.value)
    options = policy_service.Options(
        _DATASET.value, _UNITS.value, tuple(_KEYS.value), sizes, _SIDE.value, _DEPTH.value, _RTC.value, _SEED.value,
        how, tuple(_IGNORE.value),
    )  # fmt: skip
    server.check_address(network)
    say = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
    say(f"loading {_CHECKPOINT.value}")
    service = policy_service.Service(_CHECKPOINT.value, options)
    seconds = service.warm_up(say)
    logging.getLogger("qdepth_jax.serve").setLevel(logging.INFO)
    logging.getLogger("websockets").setLevel(logging.CRITICAL)  # strangers who speak no HTTP are no news
    metadata = service.metadata()

    def ready(port: int) -> None:
        line = {"ready": True, "host": _HOST.value, "port": port, "compile_s": round(seconds, 2)}
        print(json.dumps(line | {key: metadata[key] for key in ("model", "dataset", "batch_sizes")}), flush=True)

    async def serve() -> None:
        await server.PolicyServer(service, network).run(ready, signals=True)

    asyncio.run(serve())
    say("stopped")


def _whole_numbers() -> tuple[int, ...]:
    from qdepth_jax import errors

    if not all(text.isdigit() for text in _BATCHES.value):
        raise errors.UserError(f"--batch_sizes={','.join(_BATCHES.value)}: whole numbers, for example 1,2,4,8")
    return tuple(int(text) for text in _BATCHES.value)


def _api_key() -> str:
    """No flag has the key itself: everybody on a machine can read command lines."""
    from qdepth_jax import errors

    if not _KEY_FILE.value and "QDEPTH_API_KEY" not in os.environ:
        return ""
    found = f"--api_key_file={_KEY_FILE.value}" if _KEY_FILE.value else "QDEPTH_API_KEY"
    try:
        key = (pathlib.Path(_KEY_FILE.value).read_text() if _KEY_FILE.value else os.environ["QDEPTH_API_KEY"]).strip()
    except OSError as error:
        raise errors.UserError(f"{found}: {error.strerror}") from error
    # A secret that was not there must not open the server to everybody.
    if not key:
        raise errors.UserError(f"{found} is empty; without an API key, leave it away")
    return key


if __name__ == "__main__":
    command.run(main)
