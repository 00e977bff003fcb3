"""Settings shared by several published methods: networks of width 256, learning rate 3e-4, no gradient clipping."""

from contraflow.core.optim import Optim
from contraflow.flow.model import FlowSpec
from contraflow.flow.solver import Euler
from contraflow.flow.support import Box, Tanh
from contraflow.nets.velocity import ResidualMLP
from contraflow.policy.best_of import Argmax, First
from contraflow.rl.critics import Critics

OPTIM = Optim(3e-4)
CRITIC = Critics(width=256, optim=OPTIM)
NETWORK = ResidualMLP(width=256, depth=2, embedding=128)
DEEPER = ResidualMLP(width=256, depth=3, embedding=128)
TANH = FlowSpec(support=Tanh(), solver=Euler(20), margin=0.01, clock=1.0, network=NETWORK)
BOX = FlowSpec(support=Box(), solver=Euler(20), margin=0.01, clock=1.0, network=DEEPER)
NOISE_IN_BOX = FlowSpec(
    predict="noise", clip=1.0, support=Box(), solver=Euler(20), margin=0.01, clock=1.0, network=NETWORK
)
ONE = {"explore": First(), "backup": First()}
BEST = {"explore": Argmax(32), "backup": Argmax(32)}
