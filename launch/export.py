r"""Writes a model as one portable program (StableHLO by jax.export): windows in, probabilities out, on CPU or GPU.

    python launch/export.py --model=runs/pretrain --output=exported
    python launch/export.py --model=BASE --adapter=SITE --output=exported --patch_voxels=128,128,128

Who runs it needs jax and numpy only; `exported/export.json` says what goes in and what comes out.
"""

import command
from absl import flags

MODEL = flags.DEFINE_string("model", None, "Model directory or training workdir.", required=True)
ADAPTER = flags.DEFINE_string("adapter", None, "Adapter directory; it becomes part of the program.")
OUTPUT = flags.DEFINE_string("output", None, "Directory to write.", required=True)
PATCH_VOXELS = flags.DEFINE_list("patch_voxels", None, "Window as D,H,W; default: the model's training patch.")
PLATFORMS = flags.DEFINE_list("platforms", ["cpu", "cuda"], "What the program can run on: cpu, cuda, rocm, tpu.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Compute type.")


def main(_) -> None:
    """Writes the exported program; ValueError or OSError, told in one line, where it cannot."""
    sizes = PATCH_VOXELS.value or []
    if not all(size.isdecimal() for size in sizes) or len(sizes) not in (0, 3):
        raise ValueError(f"--patch_voxels={','.join(sizes)}: give three sizes, like 128,128,128")
    command.refuse_existing(OUTPUT.value)
    from mednext_jax.infer import export  # only now: JAX reads the compilation cache's place when it is imported

    patch = [int(size) for size in sizes] or None
    made = export.export_model(MODEL.value, OUTPUT.value, patch, ADAPTER.value, PLATFORMS.value, DTYPE.value)
    print(f"{OUTPUT.value}: windows {made['patch_voxels']}, {made['activation']}, on {', '.join(made['platforms'])}")


if __name__ == "__main__":
    command.run(main)
