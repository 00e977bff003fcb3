"""ReBRAC (arXiv 2305.09836): TD3 held to the actions of the data, in the actor and in the critic.

If the data contain several ways of acting, a deterministic actor goes to their mean. It is the reference for flows.
On OGBench the paper of FQL takes actor penalties of .01 to 1 and critic penalties of 0 or .01, by task.
"""

from contraflow.agents.base import Preset
from contraflow.agents.online.td3 import TD3
from contraflow.core.optim import Optim
from contraflow.nets.mlp import MLPSpec
from contraflow.rl.critics import Critics

REBRAC = TD3(
    actor_penalty=0.1,
    critic_penalty=0.01,
    normalise_q=True,
    noise=0.2,
    critic=Critics(width=512, depth=4, block="normalised", optim=Optim(3e-4)),
    actor=MLPSpec(512, 4, "gelu"),
)
PRESETS = (Preset("rebrac", REBRAC, "ReBRAC", "2305.09836", "TD3 held to the data", "dataset"),)
