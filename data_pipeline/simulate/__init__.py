"""Simulated glioma cohorts on real anatomy (MNI152), in the layouts of BraTS-2021 and BraTS-SSA.

What is real: the tissue maps, the file layouts, label values and geometry, the order of acquisition effects.
What is not: patients. Every case is drawn from the ranges in ``recipes.py``.

* ``grid`` field of view and random fields; ``anatomy`` a head; ``tumour`` a glioma in it; ``contrast`` tissue
  to signal; ``artefacts`` signal to scan; ``case`` one patient; ``cohort`` files; ``montage`` pictures.
"""

from data_pipeline.simulate.case import SimulatedCase, case_seed, simulate_case
from data_pipeline.simulate.cohort import SIMULATOR_VERSION, case_id, simulate
from data_pipeline.simulate.montage import montage
from data_pipeline.simulate.recipes import RECIPES, SOURCE, TARGET, Recipe

__all__ = [
    "RECIPES",
    "SIMULATOR_VERSION",
    "SOURCE",
    "TARGET",
    "Recipe",
    "SimulatedCase",
    "case_id",
    "case_seed",
    "montage",
    "simulate",
    "simulate_case",
]
