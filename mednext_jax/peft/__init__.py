"""Parameter-efficient fine-tuning: methods by name, rules over parameter paths, adapter files, merging.

    method = peft.create("conv_adapter", gamma=4)             # or "lora+norm", rank=8
    model, params = method.apply_to(model, base_params, key)  # starts as the base: the same logits
    trainable, frozen = peft.split(params, method.rule)       # gradients are taken of the first alone
    print(peft.summary(params, method.rule))
    peft.save_adapter(directory, method, params, base_params, info)

    adapter = peft.load_adapter(directory, base_params)       # bound to the base by hash
    model, params = adapter.apply_to(base_model, base_params)
    model, params = peft.merge(model, params)                 # a plain network again, where that is exact
"""

from mednext_jax.peft.adapter_files import (
    AdapterFile,
    check_data,
    load_adapter,
    load_config,
    merge_directories,
    save_adapter,
)
from mednext_jax.peft.adapter_set import AdapterSet
from mednext_jax.peft.cost import Cost, costs, markdown
from mednext_jax.peft.merging import merge, unmerge
from mednext_jax.peft.methods import METHODS
from mednext_jax.peft.registry import Method, compose, create, from_config, options_of
from mednext_jax.peft.rules import Clause, Rule, labels, merge_trees, rule, split
from mednext_jax.peft.summary import summary

__all__ = [
    "METHODS",
    "AdapterFile",
    "AdapterSet",
    "Clause",
    "Cost",
    "Method",
    "Rule",
    "check_data",
    "compose",
    "costs",
    "create",
    "from_config",
    "labels",
    "load_adapter",
    "load_config",
    "markdown",
    "merge",
    "merge_directories",
    "merge_trees",
    "options_of",
    "rule",
    "save_adapter",
    "split",
    "summary",
    "unmerge",
]
