"""What one run leaves in its folder while it trains, whether alone or together with other seeds."""

import shutil
import time
from pathlib import Path
from typing import Any

import jax.random as jr
import numpy as np

from contraflow.core import settings
from contraflow.core.errors import UserError
from contraflow.core.files import read_json, write_json
from contraflow.core.types import PRNGKey
from contraflow.policy.artifact import revision, save_policy
from contraflow.training import checkpoint
from contraflow.training.diagnostics import diagnose
from contraflow.training.evaluate import Episodes
from contraflow.training.log import REVISION, Log, read_evaluations
from contraflow.training.loop import Carry, World
from contraflow.training.plot import plot_curve

BEST = "evaluation.json"  # in best/: which evaluation the policy had


class RunWriter:
    """Log, best policy, latest policy and checkpoints of `run` in `folder`, continued from step `taken`.

    `about` goes into every checkpoint; `group` is what trackers call the seeds that are trained together.
    """

    def __init__(
        self, run: Any, folder: Path, world: World, taken: int, about: dict[str, Any], group: str | None = None
    ):
        self.run, self.folder = run, folder
        self._world, self._about = world, about
        self._log = Log(folder, run.trackers, settings.to_json(run), taken, group)
        self._history = read_evaluations(folder, "step", "seconds", "return_mean")
        self._clock = time.monotonic() - (self._history[-1]["seconds"] if self._history else 0.0)
        self._returns = np.zeros(0)
        self._best = -np.inf

    def restore_best(self, taken: int, carry: Carry) -> None:
        """Make `best/` the policy of the best evaluation that is on record at step `taken`, or empty it.

        A process that died after the evaluation of a checkpoint may not have written it; one that went on from an
        earlier checkpoint has forgotten the evaluations after that.
        """
        means = {int(row["step"]): row["return_mean"] for row in self._history}
        if not means:
            return
        best = max(means, key=lambda step: means[step])
        have = best_evaluation(self.folder)
        if have and means.get(have["step"], -np.inf) >= means[best]:
            self._best = means[best]
        elif best == taken:
            self._keep(best, means[best], carry)
        else:
            shutil.rmtree(self.folder / "best", ignore_errors=True)

    def metrics(self, taken: int, values: dict[str, float]) -> None:
        if values:
            self._log.metrics(taken, values | {"seconds": time.monotonic() - self._clock})

    def evaluation(self, taken: int, carry: Carry, found: Episodes, key: PRNGKey, diagnostics: bool) -> None:
        """Log an evaluation, look inside, write the checkpoint, and keep the policy if it is the best so far: in this
        order, for what is on record must be known to the checkpoint."""
        run, state = self.run, carry.learner.agent
        self._returns = returns = found.returns
        row = {
            "seconds": time.monotonic() - self._clock,
            "episodes": len(returns),
            "seed": run.seed,
            "executed": self._world.spec.execute,
            REVISION: revision(self._world.acting(run.agent.policy(state))[0]),
            "return_mean": returns.mean(),
            "return_std": returns.std(),
            "return_min": returns.min(),
            "return_max": returns.max(),
            "success": None if found.success is None else found.success.mean(),
        }
        self._log.evaluation(taken, row)
        if diagnostics:
            obs = run.source.typical_obs(carry, self._world, jr.fold_in(key, 1))
            self._log.metrics(taken, diagnose(run.agent, state, obs, jr.fold_in(key, 2)))
        self.save(taken, carry)
        if returns.mean() > self._best:
            self._keep(taken, float(returns.mean()), carry)

    def save(self, taken: int, carry: Carry) -> None:
        """The checkpoint of step `taken`, if it is not there yet, and the policy."""
        # A host simulator has no state that could be saved.
        whole = carry if self._world.spec.jittable else Carry(carry.learner, None, None)
        checkpoint.save(self.folder, taken, whole, self._about)
        self._policy("policy", carry)

    def _policy(self, name: str, carry: Carry) -> None:
        policy, spec = self._world.acting(self.run.agent.policy(carry.learner.agent))
        save_policy(self.folder / name, policy, spec, self.run.env)

    def _keep(self, step: int, mean: float, carry: Carry) -> None:
        self._best = mean
        self._policy("best", carry)
        write_json(self.folder / "best" / BEST, {"step": step, "return_mean": mean})

    def close(self) -> None:
        self._log.close()

    def finish(self, interrupted: bool) -> np.ndarray:
        """Draw the curve; the returns of the last evaluation, of which an earlier process left only the mean."""
        if self._history or self._returns.size:
            plot_curve(self.folder, getattr(self.run.source, "offline_steps", None))
        if not interrupted and not self._returns.size and self._history:
            return np.array([self._history[-1]["return_mean"]])
        return self._returns


def best_evaluation(folder: Path) -> dict[str, Any] | None:
    """`step` and `return_mean` of the policy in `folder`/best; None if there is none. Raises UserError if it is
    damaged."""
    file = folder / "best" / BEST
    if not file.exists():
        return None
    found = read_json(file)
    if not (isinstance(found, dict) and {"step", "return_mean"} <= found.keys()):
        raise UserError(f"{file} is damaged; delete {folder / 'best'}, which is written again where that can be done")
    return found


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
