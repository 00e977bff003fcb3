"""DQS (arXiv 2410.01312): diffusion Q-sampling, gradient expectation on the variance-exploding path (iDEM, 2402.06121).

It uses 1000 candidates, eta = 1, queries from the buffer and a network conditioned on the temperature. It is `RFM` with
these settings; docs/methods/dqs.md lists the deviations.
"""

from dataclasses import replace

from contraflow.agents.base import Preset
from contraflow.agents.online.common import CRITIC, ONE, OPTIM, TANH
from contraflow.agents.online.rfm import RFM, Choice, PosteriorTarget
from contraflow.flow.path import VE
from contraflow.flow.posterior.control import Fixed
from contraflow.flow.posterior.importance import Reverse
from contraflow.flow.posterior.proposal import Noise
from contraflow.policy.best_of import First
from contraflow.rl.temperature import Constant

DQS = RFM(
    flow=replace(TANH, path=VE(1e-5, 1.0)),
    target=PosteriorTarget(Reverse(1000, Noise(), Fixed(1.0)), endpoint="buffer"),
    choose=Choice(**ONE, greedy=First()),
    temperature=Constant(0.05),
    condition_on_temperature=True,
    critic=CRITIC,
    optim=OPTIM,
)
PRESETS = (Preset("dqs", DQS, "Diffusion Q-sampling", "2410.01312", "gradient expectation, no choice among particles"),)
