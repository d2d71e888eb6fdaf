"""Several processes as one run: what a launcher says, agreement, failures, the stop signal; real processes on loopback.

The fast tests run in one process; the slow ones start tests/multihost_child.py two, three and four times.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import multihost
import numpy as np
import pytest
import stored_runs

from qdepth_jax import cluster, config, distributed, errors, export_model, same_program, sharding, stop_signal

# ---- what the launcher says ----

SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "3", "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ("no cluster", 1, None)),
        ({"TPU_WORKER_HOSTNAMES": "a,b,c,d"}, ("gketpu", 4, None)),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "MEGASCALE_NUM_SLICES": "3"}, ("gketpu", 6, None)),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, ("gketpu", 1, None)),
        ({"TPU_PROCESS_ADDRESSES": "a:1,b:1", "TPU_WORKER_HOSTNAMES": "a"}, ("gketpu", 2, None)),
        ({"TPU_WORKER_HOSTNAMES": "WARNING: could not determine, set env var"}, ("no cluster", 1, None)),
        (SLURM, ("slurm", 4, None)),
        (SLURM | {"SLURM_NTASKS": "1"}, ("slurm", 1, None)),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, ("no cluster", 1, None)),  # a batch script, not a step
        ({"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1", "OMPI_COMM_WORLD_SIZE": "8"}, ("ompi", 8, None)),
        # GPUs of a node, not bound: shared evenly. One task takes all eight.
        (SLURM | {"SLURM_GPUS_ON_NODE": "8"}, ("slurm", 4, [4, 5, 6, 7])),
        (SLURM | {"SLURM_GPUS_ON_NODE": "2", "CUDA_VISIBLE_DEVICES": "0,1"}, ("slurm", 4, [1])),
        (
            SLURM | {"SLURM_GPUS_ON_NODE": "8", "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "1(x4)"},
            ("slurm", 4, [0, 1, 2, 3, 4, 5, 6, 7]),
        ),
        # Bound by SLURM: this task sees only its own, and they are numbered from 0.
        (SLURM | {"SLURM_GPUS_ON_NODE": "2", "CUDA_VISIBLE_DEVICES": "1"}, ("slurm", 4, [0])),
    ],
)
def test_what_the_environment_says(environment, expected):
    assert tuple(cluster.detect(environment)) == expected


def test_gpus_that_do_not_divide_over_the_tasks_of_a_node():
    for tasks, gpus in (("3(x2)", "8"), ("2,1", "8")):
        with pytest.raises(errors.UserError, match="gpus-per-task"):
            cluster.detect(SLURM | {"SLURM_GPUS_ON_NODE": gpus, "SLURM_STEP_TASKS_PER_NODE": tasks})


def test_a_cloud_tpu_machine_is_asked_by_its_metadata(monkeypatch):
    from jax._src import clusters

    assert cluster.detect_cloud_tpu() == cluster.NONE
    monkeypatch.setattr(clusters.GceTpuCluster, "is_env_present", lambda: True)
    monkeypatch.setattr(clusters.GceTpuCluster, "_get_worker_list_in_slice", lambda: ["a", "b", "c", "d"])
    monkeypatch.setenv("MEGASCALE_NUM_SLICES", "2")
    assert cluster.detect_cloud_tpu() == ("gcetpu", 8, None)


def test_every_kind_is_a_method_of_jax():
    from jax._src import clusters

    names = {found.name for found in clusters.ClusterEnv._cluster_types}
    assert {"gketpu", "gcetpu", "slurm", "ompi"} <= names


# ---- one process ----


def test_one_process_starts_nothing_and_everything_is_a_no_op(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("TPU_", "SLURM_", "OMPI_", "MEGASCALE_")):
            monkeypatch.delenv(name)
    assert distributed.start() == "one process (no cluster)"
    for name, value in (SLURM | {"SLURM_NTASKS": "1"}).items():
        monkeypatch.setenv(name, value)
    assert distributed.start() == "one process (slurm)"
    assert distributed.start("localhost:1", 1, 0) == "one process (as given)"
    assert not distributed.is_started() and distributed.is_main() and distributed.process() == (0, 1)
    distributed.barrier("x")
    distributed.stop()
    assert distributed.gather({"a": 1}, "x") == [{"a": 1}]
    assert distributed.from_main(5) == 5
    assert distributed.all_agree(True) and not distributed.all_agree(False)
    distributed.same_everywhere("config", {"a": 1})
    assert distributed.together(lambda: 3) == 3
    with pytest.raises(KeyError, match="k"):
        distributed.together(lambda: {}["k"])
    first, second = distributed.new_id(), distributed.new_id()
    assert re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{6}", first) and first != second


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("h:1", None, None), "--num_processes, --process_id not given"),
        ((None, 2, 0), "--coordinator not given"),
        (("h:1", 2, 2), "--process_id=2 --num_processes=2: processes are numbered from 0 to N - 1"),
        (("h:1", 0, 0), "numbered from 0"),
        (("h", 2, 0), "HOST:PORT"),
        (("h:port", 2, 0), "HOST:PORT"),
        (("h:70000", 2, 0), "HOST:PORT"),
    ],
)
def test_arguments_that_cannot_be(arguments, message):
    with pytest.raises(errors.UserError, match=message):
        distributed.start(*arguments)


def test_a_port_in_use_is_named():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        with pytest.raises(errors.UserError, match=f"port {taken.getsockname()[1]} of this machine cannot be used"):
            distributed.start(f"localhost:{taken.getsockname()[1]}", 2, 0)


def test_start_after_devices_were_used_is_refused():
    jax.devices()
    with pytest.raises(errors.UserError, match="devices were used before"):
        distributed.start("localhost:1", 2, 0)


def test_import_stays_light():
    program = "import sys, qdepth_jax.distributed as d; assert d.is_main(); print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=multihost.ROOT)
    assert done.stdout == "False\n", done.stderr


def test_the_plan_of_the_batch_is_checked():
    mesh = sharding.make_mesh(config.MeshConfig(1, 4, 2))
    lowered = jax.jit(lambda x: x * 2).lower(jnp.zeros((8,)))
    rows = sharding.batch_rows(mesh, 8)
    same_program.check(lowered, {"seed": 1}, rows, mesh, 8)
    with pytest.raises(errors.UserError, match=r"host 0 reads rows \[\[0, 3\], .*rows \[\[3, 4\]\] are read by"):
        same_program.check(lowered, {"seed": 1}, np.delete(rows, 3), mesh, 8)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_process_stops_after_the_step_and_puts_the_handlers_back(number):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with stop_signal.StopSignal() as stop:
        assert not stop.reached(1)
        os.kill(os.getpid(), number)
        assert stop.reached(2) and stop.reached(3)
        with pytest.raises(KeyboardInterrupt):  # Ctrl-C, the second time
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_stop_signal_belongs_to_the_main_thread():
    found = []

    def enter():
        try:
            with stop_signal.StopSignal():
                pass
        except ValueError as error:
            found.append(str(error))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert len(found) == 1 and "main thread" in found[0]


# ---- real processes ----


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_agreement_between_real_processes(count):
    """Every check of tests/multihost_child.py; each process prints one line for each, equal on all where it must be."""
    done = multihost.run_all(lambda port, i: [multihost.CHILD, "agree", str(port), str(count), str(i)], count)
    for i, (code, out, err) in enumerate(done):
        assert code == 0, f"process {i}:\n{out}\n{err}"
        assert out.splitlines()[-1] == "all checks passed", f"process {i}:\n{out}\n{err}"


@pytest.mark.slow
def test_another_config_on_one_host_is_the_same_message_everywhere():
    done = multihost.run_all(lambda port, i: [multihost.CHILD, "config", str(port), "3", str(i)], 3)
    messages = {err[err.index("error:") :].split("\n\n")[0].strip() for _, _, err in done if "error:" in err}
    assert [code for code, _, _ in done] == [2, 2, 2], done
    (message,) = messages
    assert "host 0 (there) and host 1 (here):\n    optim.learning_rate: 0.001 there, 0.002 here" in message
    assert "host 0 (there) and host 2 (here):\n    name: 'a' there, 'b' here" in message


@pytest.mark.slow
def test_a_failure_on_one_host_stops_all_with_its_message():
    done = multihost.run_all(lambda port, i: [multihost.CHILD, "fail", str(port), "3", str(i)], 3)
    assert [code for code, _, _ in done] == [1, 1, 1], done
    assert "error: host 1: FileNotFoundError: [Errno 2] No such file or directory: '/no/data'" in done[0][2]
    assert "error: host 1: FileNotFoundError: [Errno 2] No such file or directory: '/no/data'" in done[2][2]
    assert "FileNotFoundError" in done[1][2] and "Traceback" in done[1][2]


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "text"), [("storage", "/data/shard cannot be read"), ("alone_storage", "no answer")])
def test_a_host_whose_storage_is_away_ends_all_with_try_again(mode, text):
    """Told where the others wait for it (together), and while they are inside a collective (the watch)."""
    done = multihost.run_all(lambda port, i: [multihost.CHILD, mode, str(port), "2", str(i)], 2)
    assert [code for code, _, _ in done] == [75, 75], done
    assert all("error: " in err and text in err for _, _, err in done), done


@pytest.mark.slow
def test_a_host_that_cannot_read_an_export_keeps_nobody_waiting_in_a_sum(tmp_path, monkeypatch):
    stored_runs.write(tmp_path / "run", "policy", stored_runs.BASELINE)
    options = export_model.Options(format="safetensors")
    export_model.write_export(str(tmp_path / "run"), str(tmp_path / "out"), options, lambda line: None)
    monkeypatch.setenv("EXPORT", str(tmp_path / "out"))
    done = multihost.run_all(lambda port, i: [multihost.CHILD, "export", str(port), "2", str(i)], 2)
    assert [code for code, _, _ in done] == [75, 75], done
    assert "cannot be read at the moment" in done[0][2] and "Stale file handle" in done[1][2]


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_between_two_steps_stops_the_others_inside_theirs(failing):
    done = multihost.run_all(lambda port, i: [multihost.CHILD, f"alone{failing}", str(port), "2", str(i)], 2)
    assert [code for code, _, _ in done] == [2, 2], done
    assert "error: shard 7 is damaged" in done[failing][2]
    assert f"error: host {failing}: shard 7 is damaged" in done[1 - failing][2]


@pytest.mark.slow
def test_an_unreachable_coordinator_is_named():
    port = multihost.free_port()
    done = multihost.run_all(lambda _, i: [multihost.CHILD, "agree", str(port), "2", "1", "--timeout=3"], 1)
    code, _, err = done[0]
    assert code == 75, err  # the other machine may be late
    assert f"error: coordinator 127.0.0.1:{port}: not all processes of the run met within 3 s" in err


@pytest.mark.slow
def test_a_process_that_never_starts_is_an_error_at_the_others():
    done = multihost.run_all(lambda port, i: [multihost.CHILD, "agree", str(port), "3", str(i), "--timeout=5"], 2)
    for code, _, err in done:
        assert code == 75, err
        assert "not all processes of the run met within 5 s" in err


@pytest.mark.slow
def test_ctrl_c_on_one_host_stops_all_at_the_same_step():
    processes = multihost.start_all(lambda port, i: [multihost.CHILD, "stop", str(port), "2", str(i)], 2)
    multihost.wait_for_line(processes, "step 50")
    processes[1].process.send_signal(signal.SIGINT)  # SIGTERM: test_multihost.py
    done = multihost.finish(processes)
    assert [code for code, _, _ in done] == [0, 0], done
    steps = [re.search(r"stopped at (\d+)", out)[1] for _, out, _ in done]
    assert steps[0] == steps[1] and int(steps[0]) > 50


@pytest.mark.slow
@pytest.mark.parametrize(("when", "said"), [("early", "stopped before 5001"), ("late", "stopped at 5001")])
def test_a_signal_while_a_resumed_run_starts_is_not_lost(when, said):
    """The service knows steps that were told to it alone: before the first, it chooses step 1."""
    done = multihost.run_all(lambda port, i: [multihost.CHILD, f"stop_{when}", str(port), "2", str(i)], 2)
    assert [(code, out.splitlines()[-1]) for code, out, _ in done] == [(0, said)] * 2, done
