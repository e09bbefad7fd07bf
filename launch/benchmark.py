r"""Measures speed and memory on this machine; upstream's PyTorch network beside ours, in one run, alternating.

    python launch/benchmark.py --work=step --variant=S --size=64 --peer=CHECKOUT_OF_MEDNEXT --json=step.json
    python launch/benchmark.py --work=step --variant=S --size=128 --batch=2 --dtype=bfloat16 --deep_supervision
    python launch/benchmark.py --work=depthwise --size=64 --channels=32
    python launch/benchmark.py --work=peft --variant=S --size=64

Work: "step" (forward, and forward + backward), "depthwise" (each operation beside a copy of its bytes), "peft" (each
method's compiled step beside full fine-tuning's). Times are medians; a ratio is ours over the peer's. The machine's
ceilings, copying and multiplying matrices, are measured in the same run. --peer needs PyTorch and a checkout of
MIC-DKFZ/MedNeXt.
"""

import json
import sys
from pathlib import Path

import command
from absl import flags

WORK = flags.DEFINE_enum("work", "step", ["step", "depthwise", "peft"], "What to measure.")
VARIANT = flags.DEFINE_enum("variant", "S", ["S", "B", "M", "L"], "Network.")
KERNEL = flags.DEFINE_integer("kernel_size", 3, "Kernel size.")
SIZE = flags.DEFINE_integer("size", 64, "Edge of the cubic patch.", lower_bound=16)
BATCH = flags.DEFINE_integer("batch", 1, "Patches.", lower_bound=1)
CHANNELS = flags.DEFINE_integer("channels", 32, "Channels of --work=depthwise.", lower_bound=1)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Compute type.")
DEEP_SUPERVISION = flags.DEFINE_bool("deep_supervision", False, "All five heads.")
REMAT = flags.DEFINE_enum("remat", "mlp", ["none", "mlp", "block"], "What the backward pass computes again.")
REPEATS = flags.DEFINE_integer("repeats", 5, "Timed runs of each.", lower_bound=1)
PEER = flags.DEFINE_string("peer", "", "Checkout of upstream MedNeXt to time beside ours.")
PEER_COMPILE = flags.DEFINE_bool("peer_compile", False, "Also time the peer under torch.compile.")
JSON = flags.DEFINE_string("json", "", "Write the figures to this file too.")


def main(_) -> int:
    import benchmark_peer
    import benchmark_work
    import jax

    network = {
        "variant": VARIANT.value, "kernel_size": KERNEL.value, "deep_supervision": DEEP_SUPERVISION.value,
        "dtype": DTYPE.value, "remat": REMAT.value,
    }  # fmt: skip
    if WORK.value == "depthwise":
        jobs = benchmark_work.depthwise_jobs(BATCH.value, SIZE.value, CHANNELS.value, DTYPE.value)
    elif WORK.value == "step":
        jobs = benchmark_work.step_jobs(network, BATCH.value, SIZE.value)
        if PEER.value:
            jobs += benchmark_peer.jobs(Path(PEER.value), network, BATCH.value, SIZE.value, PEER_COMPILE.value)
    else:
        print(benchmark_work.peft_table(network, SIZE.value, BATCH.value, REPEATS.value))
        return 0
    rows = benchmark_work.measure(jobs, REPEATS.value)
    result = {
        "command": sys.argv,
        "device": str(jax.devices()[0].device_kind),
        "jax": jax.__version__,
        "ceilings": benchmark_work.ceilings(),
        "rows": rows,
        "ratio_to_peer": benchmark_peer.ratios(rows),
    }
    print(benchmark_work.table(result))
    if JSON.value:
        Path(JSON.value).write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    command.run(main)
