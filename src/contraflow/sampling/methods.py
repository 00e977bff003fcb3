"""The methods of `contraflow sample` by name."""

from contraflow.flow.path import VE
from contraflow.flow.posterior.control import Fixed, MinVariance
from contraflow.flow.posterior.importance import Reverse
from contraflow.flow.posterior.proposal import Mixture, Noise, Particles
from contraflow.sampling.fab import Fab
from contraflow.sampling.trainer import Estimated, Trainer

GRADIENT = Estimated(Reverse(control=Fixed(1.0)))
NEAR = Mixture((Noise(), Particles(0.3)))

METHODS: dict[str, Trainer] = {
    "rfm": Trainer(),  # Reverse Flow Matching, 2601.08136, with the official rule
    "qne": Trainer(Estimated(Reverse(control=Fixed(0.0)))),  # noise-expectation
    "idem": Trainer(GRADIENT),  # gradient-expectation, on the same path as the others
    # iDEM, 2402.06121: the same on its own path, where candidates are N(x_t, beta^2). It is regressed as noise, which
    # is a score error weighted by beta^2, and has a buffer.
    "idem-ve": Trainer(GRADIENT, path=VE(0.01, 4.0), predict="noise", kept=8),
    # Ours: RFM with half of the candidates near current samples.
    "mixture": Trainer(Estimated(Reverse(proposal=NEAR, control=MinVariance(shape="isotropic", centred=False)))),
    "fab": Trainer(Fab(), kept=8),  # 2208.01893 with flow matching
}
