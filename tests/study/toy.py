"""A study whose right answer is known: one arm cannot learn, and two arms are the same method.

``full`` and ``again`` differ in nothing but the order of their patches; ``frozen`` is full fine-tuning at a learning
rate that moves no weight. The cohorts are those of ``cohorts.py``: who does not learn the target sees no tumour there.
What these arms rule out is asked for too: the study leaves it out and says so.
"""

from ml_collections import ConfigDict

from configs import study

TINY = ("model.n_channels=4", "model.exp_r=1", "model.kernel_size=1", "model.block_counts=0,0,0,0,0,0,0,0,0")
SHORT = ("data.patch_voxels=16,16,16", "data.batch_size=2", "optim.total_steps=120", "eval.every=0",
         "checkpoint_every=120")  # fmt: skip
FAST = "optim.peak_lr=0.03"


def get_config() -> ConfigDict:
    """Give ``source.root`` and ``target.root``."""
    c = study.get_config("demo")
    c.source.update(val_fraction=0.2, test_fraction=0.3)
    c.target.update(val_fraction=0.1, test_fraction=0.5)
    c.simulate.enabled = False
    c.subset_seeds = (0, 1)
    c.pretrain.overrides = (*TINY, *SHORT, FAST)
    c.overrides = SHORT
    c.recipes.full.overrides = (FAST,)
    c.recipes.again = ConfigDict(dict(file="full", overrides=(FAST, "data.order_seed=7")))
    c.recipes.frozen = ConfigDict(dict(file="full", overrides=("optim.peak_lr=1e-20",)))
    c.arms = ("full", "again", "frozen")
    c.max_train_cases = 4
    c.few_shot.update(sizes=(1, 4), arms=("full", "lora"), replicates=1)
    c.ablations = study.FAULTS  # none is possible: they are compared by an arm that is not here
    c.predict.min_component_mm3 = ()
    c.pages = ()
    return c
