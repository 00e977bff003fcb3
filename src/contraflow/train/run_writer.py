"""What one run leaves in its folder while it trains, whether alone or together with other seeds."""

import time
from pathlib import Path
from typing import Any

import jax.random as jr
import numpy as np

from contraflow.core import settings
from contraflow.core.types import PRNGKey, UserError
from contraflow.policy.artifact import save_policy
from contraflow.train import checkpoint
from contraflow.train.diagnostics import diagnose
from contraflow.train.log import Log, read_evaluations
from contraflow.train.loop import Carry
from contraflow.train.plot import plot_curve


class Record:
    """Log, best policy, latest policy and checkpoints of `run` in `folder`, continued from step `taken`."""

    def __init__(self, run: Any, folder: Path, env: Any, taken: int):
        self.run, self.folder = run, folder
        self._spec, self._jittable = env.spec, env.spec.jittable
        self._log = Log(folder, run.trackers, settings.to_json(run), taken)
        self._history = read_evaluations(folder)
        self._clock = time.monotonic() - (self._history[-1]["seconds"] if self._history else 0.0)
        self._best = max((row["return_mean"] for row in self._history), default=-np.inf)
        self._returns = np.zeros(0)

    def metrics(self, taken: int, values: dict[str, float]) -> None:
        if values:
            self._log.metrics(taken, values | {"seconds": time.monotonic() - self._clock})

    def evaluation(self, taken: int, carry: Carry, returns: np.ndarray, key: PRNGKey, diagnostics: bool) -> None:
        """Log the returns [episodes] of an evaluation, keep the policy if it is the best so far, look inside."""
        run, state = self.run, carry.learner.agent
        self._returns = returns
        if returns.mean() > self._best:
            self._best = returns.mean()
            save_policy(self.folder / "best", run.agent.policy(state), self._spec, run.env)
        row = {
            "seconds": time.monotonic() - self._clock,
            "return_mean": returns.mean(),
            "return_std": returns.std(),
            "return_min": returns.min(),
            "return_max": returns.max(),
        }
        self._log.evaluation(taken, row)
        if diagnostics:
            obs = run.typical_obs(carry, jr.fold_in(key, 1))
            self._log.metrics(taken, diagnose(run.agent, state, obs, jr.fold_in(key, 2)))

    def save(self, taken: int, carry: Carry) -> None:
        """The checkpoint of step `taken`, if it is not there yet, and the policy."""
        checkpoint.save(self.folder, taken, carry if self._jittable else carry.learner)
        policy = self.run.agent.policy(carry.learner.agent)
        save_policy(self.folder / "policy", policy, self._spec, self.run.env)

    def close(self) -> None:
        self._log.close()

    def finish(self, interrupted: bool) -> np.ndarray:
        """Draw the curve; the returns of the last evaluation, of which an earlier process left only the mean."""
        if self._history or self._returns.size:
            plot_curve(self.folder)
        if not interrupted and not self._returns.size and self._history:
            return np.array([self._history[-1]["return_mean"]])
        return self._returns


def check_finite(metrics: dict[str, float], before: int, after: int, folder: Path) -> None:
    """Raise UserError naming every metric that is not finite, those of the critic first: what it spoils comes later."""
    bad = sorted(
        (name for name, value in metrics.items() if not np.isfinite(value)), key=lambda n: ("critic" not in n, n)
    )
    if bad:
        raise UserError(
            f"{', '.join(bad)} became {metrics[bad[0]]} between steps {before} and {after}; the last good checkpoint "
            f"in {folder} is kept: lower the learning rate or scale the reward, then start a new run"
        )
