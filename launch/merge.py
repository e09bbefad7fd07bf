r"""Folds an adapter into its base: a plain model directory, same speed and use as the base, no adapter needed.

    python launch/merge.py --model=runs/pretrain --adapter=runs/peft/adapter --output=models/merged
    python launch/predict.py --model=models/merged --input=CASES --output=PREDICTIONS

Only for methods that add linear branches (lora, ssf, depthwise_adapter) or nothing (norm, head, decoder, ...); for
the others the command says why not. The merged network is compared with the adapted one before anything is written.
"""

import command
from absl import flags

MODEL = flags.DEFINE_string("model", None, "The adapter's base: model directory or training workdir.", required=True)
ADAPTER = flags.DEFINE_string("adapter", None, "Adapter directory, or the workdir of its training.", required=True)
OUTPUT = flags.DEFINE_string("output", None, "Model directory to write.", required=True)
FORCE = flags.DEFINE_bool("force", False, "Merge into another base than the one the adapter was trained on.")


def main(_) -> None:
    """Writes the merged model; ValueError, told in one line, for an adapter that is not linear or not of this base."""
    command.refuse_existing(OUTPUT.value)
    from mednext_jax import peft  # only now: JAX reads the compilation cache's place when it is imported

    info = peft.merge_directories(MODEL.value, ADAPTER.value, OUTPUT.value, FORCE.value)
    print(f"{OUTPUT.value}: merged and compared with the adapted network, {info.params_hash[:19]}")


if __name__ == "__main__":
    command.run(main)
