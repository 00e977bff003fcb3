"""The estimators of the posterior mean E[x1 | x_t] that an agent can choose from; a new one is added here."""

from contraflow.flow.posterior.importance import FromData, Local, Pooled, Reverse
from contraflow.flow.posterior.markov import Gibbs, Markov

Estimator = Reverse | Markov | Gibbs | Pooled | Local | FromData
