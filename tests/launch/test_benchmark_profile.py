"""What the benchmark tells of where the time goes."""

import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "launch"))
from benchmarks import profile, timing  # noqa: E402


def event(name, milliseconds, thread=1, **arguments):
    return {"name": name, "pid": 7, "tid": thread, "dur": 1e3 * milliseconds, "args": arguments}


def thread(number, name):
    return {"name": "thread_name", "ph": "M", "pid": 7, "tid": number, "args": {"name": name}}


CPU = [
    thread(1, "worker"), event("dot.1", 3, hlo_op="dot.1"), event("dot.12.clone", 5, hlo_op="dot.12"),
    event("add_fusion", 2, hlo_op="add_fusion"), event("Execute", 20), event("while.2", 30, hlo_op="while.2"),
    {"name": "process_name", "pid": 7, "args": {}},
]  # fmt: skip


def test_operations_are_added_up_by_name_and_what_holds_them_is_not():
    dot, add, every = profile.longest(CPU)
    assert dot == {"name": "dot", "milliseconds": 8.0, "times": 2, "share": 0.8}
    assert (add["name"], add["milliseconds"], add["times"]) == ("add_fusion", 2.0, 1)
    assert every == {"name": "all", "milliseconds": 10.0, "times": 3, "share": 1.0}


def test_what_takes_little_is_told_together():
    many = [event(f"{name}_fusion", 1, hlo_op=name) for name in "abcdefghijklmnopqrstuvwxyzäö"]
    *_, others, every = profile.longest([*CPU, *many])
    assert (others["name"], others["milliseconds"], others["times"]) == ("others", 5.0, 5)
    assert every["milliseconds"] == 38.0


def test_on_a_gpu_the_streams_count_and_the_lines_that_repeat_them_do_not():
    streams = [thread(2, "Stream #14(Compute)"), thread(3, "XLA Ops"), event("bottleneck", 4, 2, hlo_op="call.3"),
               event("call.3", 4, 3, hlo_op="call.3")]  # fmt: skip
    assert [(row["name"], row["milliseconds"]) for row in profile.longest([*CPU, *streams])] == [
        ("bottleneck", 4.0), ("all", 4.0)]  # fmt: skip


def test_a_trace_without_operations_is_refused():
    with pytest.raises(ValueError, match="saw no operation"):
        profile.longest([thread(1, "worker"), event("Execute", 20)])


def product(size):
    return timing.compiled(lambda a: jnp.tanh(a @ a), jnp.ones((size, size)))


def test_a_run_is_profiled_and_its_trace_left(tmp_path):
    rows = profile.of(timing.Work("product", product, (256,)), str(tmp_path))
    assert any("tanh" in row["name"] for row in rows) and sum(row["share"] for row in rows) == pytest.approx(2)
    assert list(tmp_path.rglob("*.trace.json.gz"))
    found = {"rows": [{"name": "a", "seconds": 1.0}], "ratio_to_peer": {}, "profile": {"product": rows}, "device": "x",
             "jax": "y", "ceilings": {"copy_gb_per_s": 1.0, "matmul_gflop_per_s": 1.0, "dtype": "float32"}}  # fmt: skip
    assert "product, what takes longest in one run more" in timing.table(found)
