"""DPMD (arXiv 2502.00361): diffusion policy mirror descent, `PMD` with the paper's settings (docs/methods/pmd.md)."""

from contraflow.agents.base import Preset
from contraflow.agents.online.common import CRITIC, OPTIM
from contraflow.agents.online.pmd import PMD, Selection
from contraflow.policy.best_of import Argmax

DPMD = PMD(choose=Selection(greedy=Argmax(10)), critic=CRITIC, optim=OPTIM)
PRESETS = (Preset("dpmd", DPMD, "Diffusion policy mirror descent", "2502.00361", "the official settings of pmd"),)
