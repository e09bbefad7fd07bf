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


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def meeting(waits, limit):
    """What two processes print that meet; the second comes ``waits`` seconds late. The processes are ended."""
    port = free_port()
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


JOINING = """
import sys
sys.path.insert(0, "launch")
import command, processes
from mednext_jax.train import devices

devices.JOIN_SECONDS, devices.FREE_SECONDS = 3, 1

sys.argv, (address, me) = sys.argv[:1], sys.argv[1:]  # the rest would be flags

def main(_):
    with processes.joined(address, 2, int(me)):
        print("together", flush=True)

command.run(main)
"""


def ends_alone(address, me):
    """Exit code and messages of process ``me`` of two, the other of which never comes."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", JOINING, address, str(me)], env=environment, cwd=ROOT,
                          capture_output=True, text=True, timeout=100)  # fmt: skip
    assert "together" not in done.stdout and done.returncode != 0
    return done.returncode, done.stderr


@pytest.mark.timeout(120)
def test_process_whose_first_one_never_comes_says_so():
    code, said = ends_alone(f"127.0.0.1:{free_port()}", 1)
    assert code == 1 and said.count("\n") == 1
    assert said.startswith("error: process 1 of 2: the processes of this run did not find each other (none answers at")


@pytest.mark.timeout(120)
def test_first_process_whose_port_is_taken_says_so():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        code, said = ends_alone(f"127.0.0.1:{other.getsockname()[1]}", 0)
    assert code == 1 and said.count("\n") == 1
    assert said.startswith("error: process 0 of 2: port") and "give another port" in said


@pytest.mark.timeout(120)
def test_first_process_that_is_left_alone_has_a_clear_last_line():
    code, said = ends_alone(f"127.0.0.1:{free_port()}", 0)
    assert code  # JAX aborts, from C++, and says a lot before
    assert said.splitlines()[-1].startswith("error: process 0 of 2 was ended from outside, or because another")
