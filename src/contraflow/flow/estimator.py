"""The estimators of the posterior mean E[x1 | x_t] that an agent can choose from; a new one is added here."""

from contraflow.flow.markov import Gibbs, Markov
from contraflow.flow.posterior import FromData, Local, Pooled, Reverse

Estimator = Reverse | Markov | Gibbs | Pooled | Local | FromData
