"""What a config would train and cost, beside full fine-tuning, before anyone waits for a night."""

from collections.abc import Mapping
from typing import Any

import jax

from mednext_jax import modeldir, peft
from mednext_jax.nn.mednext import MedNeXt, parameter_shapes
from mednext_jax.train import experiment, network

TIMED_STEPS = 3


def planned_model(config: Mapping[str, Any]) -> MedNeXt:
    """The network that a run would start from, without its parameters and without data.

    Raises: ValueError or FileNotFoundError if ``init_from`` and the config do not fit.
    """
    options = network.compute_options(config) | {"deep_supervision": config["model"]["deep_supervision"]}
    if config["init_from"]:
        return modeldir.load_info(config["init_from"]).network(**options)
    if not config["model"]["variant"]:
        raise ValueError("config.model.variant and config.init_from are both empty: set one of them")
    n_classes = 3 if config["model"]["output"] == "regions" else 4
    return MedNeXt(n_classes=n_classes, **{"kernel_size": 3, **network.wanted_arguments(config)}, **options)


def report(config: Mapping[str, Any]) -> str:
    """The parameter summary of the config's method and a table of costs: full fine-tuning, then the method.

    The memory is the compiled step's for this machine; step times are measured on a GPU only.
    """
    experiment.check_config(config)
    model, method = planned_model(config), experiment.method_of(config)
    adapted = model.clone(adapters=method.adapters)
    rows = [peft.create("full")] + ([method] if method.name != "full" else [])
    costs = peft.costs(
        rows,
        model,
        config["data"]["patch_voxels"],
        config["data"]["batch_size"],
        compiled=True,
        timed_steps=TIMED_STEPS if jax.default_backend() == "gpu" else 0,
    )
    head = (
        f"{method.name} on {config['init_from'] or 'a new network'}, batch {config['data']['batch_size']} of "
    )
    head += (
        "x".join(map(str, config["data"]["patch_voxels"])) + f", compiled for {jax.devices()[0].device_kind}"
    )
    return "\n".join([head, peft.summary(parameter_shapes(adapted), method.rule), "", peft.markdown(costs)])
