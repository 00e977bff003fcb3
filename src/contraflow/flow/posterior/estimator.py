"""The estimators of the posterior mean E[x1 | x_t] that an agent can choose from. Add new ones here."""

from contraflow.flow.posterior.gibbs import Gibbs
from contraflow.flow.posterior.importance import Pooled, Reverse
from contraflow.flow.posterior.local import Local
from contraflow.flow.posterior.markov import Markov

Estimator = Reverse | Markov | Gibbs | Pooled | Local
