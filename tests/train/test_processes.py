"""Several processes: whether there are any, as launchers tell it, and meeting."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax._src import distributed

from mednext_jax.train import devices

ROOT = Path(__file__).resolve().parents[2]
SLURM = {"SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "node[01-02]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1",
         "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2"}  # fmt: skip
OPEN_MPI = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911", "OMPI_COMM_WORLD_SIZE": "4",
            "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}  # fmt: skip
SBATCH = {name: SLURM[name] for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")}


@pytest.fixture
def launched(monkeypatch):
    """Sets the variables of a launcher, and no other launcher's."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "JAX_COORDINATOR")):
            monkeypatch.delenv(name)

    def launch(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return launch


@pytest.mark.parametrize("variables, joins", [
    ({}, False), (SBATCH, False), ({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, False), (SLURM, True), (OPEN_MPI, True),
    ({**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1"}, False),
], ids=["none", "sbatch alone", "srun of one", "srun of two", "mpirun of four", "mpirun of one"])  # fmt: skip
def test_processes_are_joined_where_a_launcher_started_several(launched, monkeypatch, variables, joins):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: calls.append(given))
    launched(variables)
    devices.join_processes()
    limits = {"initialization_timeout": 300, "heartbeat_timeout_seconds": 60}
    assert calls == [limits] * joins  # and no place: JAX finds it in the same variables


def without(variables, name):
    return {key: value for key, value in variables.items() if key != name}


@pytest.mark.parametrize("variables, told", [
    (without(OPEN_MPI, "OMPI_MCA_orte_hnp_uri"), "coordinator_address should be defined"),
    (without(OPEN_MPI, "OMPI_COMM_WORLD_RANK"), "OMPI_COMM_WORLD_RANK"),
    ({**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "many"}, "OMPI_COMM_WORLD_SIZE is 'many'"),
    ({**SLURM, "SLURM_PROCID": "first"}, "'first'"),
    (without(SLURM, "SLURM_STEP_NODELIST"), "coordinator_address should be defined"),
])  # fmt: skip
def test_launcher_that_says_too_little_is_told_with_the_way_out(launched, monkeypatch, variables, told):
    # JAX's own reading of the variables, in a state of its own: this process has used its devices already.
    monkeypatch.setattr(jax.distributed, "initialize", distributed.State().initialize)
    launched(variables)
    with pytest.raises(ValueError, match=f"launcher.*{told}.*--coordinator=HOST:PORT") as error:
        devices.join_processes()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("address", ["node01", "node01:", "node01:http"])
def test_address_without_a_port_is_refused(address):
    with pytest.raises(ValueError, match="--coordinator is 'node01.*HOST:PORT"):
        devices.join_processes(address, 2, 0)


def test_process_without_a_device_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="config.n_devices is 1, which leaves some of the 2 processes"):
        devices.make_mesh(1)


MEETING = """
import sys, time
import jax
from mednext_jax.train import devices

port, me, waits, limit = int(sys.argv[1]), int(sys.argv[2]), *map(float, sys.argv[3:])
devices.MEET_SECONDS = int(limit)
devices.join_processes(f"127.0.0.1:{port}", 2, me)
jax.devices()  # the first look at them waits for all processes too
time.sleep(waits if me else 0)
started = time.monotonic()
try:
    devices.meet("here")
    print(f"met after {time.monotonic() - started:.1f}", flush=True)
    devices.meet("here")
    print("and again", flush=True)
except Exception as error:
    print(f"alone after {time.monotonic() - started:.1f}: lost another is {devices.lost_another(error)}", flush=True)
"""


def meeting(waits, limit):
    """What two processes print that meet; the second comes ``waits`` seconds late. The processes are ended."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", MEETING, str(port)]
    pair = [
        subprocess.Popen(
            [*command, str(me), str(waits), str(limit)], env=environment, stdout=subprocess.PIPE, text=True
        )
        for me in (0, 1)
    ]
    try:
        if waits > limit:
            return [pair[0].stdout.readline()]
        return [process.communicate(timeout=90)[0] for process in pair]
    finally:
        for process in reversed(pair):  # the first one serves the others, who would complain at length
            process.kill()
            process.wait()
            process.stdout.close()


@pytest.mark.timeout(120)
def test_processes_wait_for_a_late_one_and_meet_again_under_the_same_name():
    first, second = (text.splitlines() for text in meeting(waits=3, limit=60))
    assert first[1] == second[1] == "and again"
    assert float(first[0].split()[-1]) > 2


@pytest.mark.timeout(120)
def test_process_that_waits_in_vain_counts_the_other_as_lost():
    (line,) = meeting(waits=300, limit=1)
    assert line.startswith("alone after ") and line.endswith("lost another is True\n")
    assert 0.9 < float(line.split()[2].rstrip(":")) < 30
