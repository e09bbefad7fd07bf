"""The benchmark's programs for a GPU that is not here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
H200 = ROOT / "launch" / "benchmarks" / "h200.txtpb"
# In a process of its own: the module sets what JAX reads when it is imported.
DEVICELESS = """
import json, sys
from pathlib import Path
sys.path.insert(0, "launch")
from benchmarks import deviceless
import jax
{replaced}
network = {{"variant": "S", "kernel_size": 3, "deep_supervision": False, "dtype": "float32", "remat": "mlp"}}
print(json.dumps(deviceless.rows(network, 16, 1, ["head"], Path(sys.argv[1]))))
"""


def deviceless(path, replaced):
    command = [sys.executable, "-c", DEVICELESS.format(replaced=replaced), str(path)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def test_steps_compiled_for_a_described_place_say_what_they_move_and_hold():
    mesh = "jax.sharding.Mesh(jax.devices('cpu')[:1], ('data',))"
    place = f"jax.sharding.NamedSharding({mesh}, jax.sharding.PartitionSpec())"
    here = f"deviceless._place = lambda description, gpu: {place}"
    rows = json.loads(deviceless(H200, here).stdout.splitlines()[-1])
    assert [row["name"] for row in rows] == ["forward", "step of full", "step of head"]
    forward, full, head = rows
    assert 3 * forward["gflop"] < full["gflop"] and head["gflop"] < 1.3 * forward["gflop"]
    assert head["gbytes"] < full["gbytes"] and 0 < head["temporaries_gb"] < full["temporaries_gb"]
    assert all(row["bandwidth_ms"] == pytest.approx(1e3 * row["gbytes"] / 4800) for row in rows)


def test_without_the_plugin_or_with_a_file_that_describes_no_card_one_line_says_so(tmp_path):
    (tmp_path / "notes.txt").write_text("gpu_device_info { memory_bandwidth: 4800000000000 }")
    absent = "deviceless.topologies.get_topology_desc = lambda **_: (_ for _ in ()).throw(NotImplementedError())"
    found = deviceless(H200, absent)
    assert "ValueError: compiling for a GPU needs JAX's CUDA plugin: pip install 'mednext_jax[cuda12]'" in found.stderr
    assert "notes.txt has no platform_name, cuda_compute_cap" in deviceless(tmp_path / "notes.txt", "").stderr
