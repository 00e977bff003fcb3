"""`contraflow eval`: returns and videos of a trained policy."""

import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax.random as jr
import numpy as np
import tyro

from contraflow.cli.flags import Modules, read_flags
from contraflow.core.files import make_folder
from contraflow.core.trust import Trust
from contraflow.core.types import UserError
from contraflow.envs.base import Env, notes
from contraflow.envs.chunk import singly
from contraflow.policy import base
from contraflow.policy.base import act_batch
from contraflow.policy.guided import guided, value_scale
from contraflow.policy.uniform import still_policy, uniform_policy
from contraflow.runtime.policy import Policy, load
from contraflow.runtime.variants import OWN, environment, variants
from contraflow.training.evaluate import evaluate, margin
from contraflow.training.loop import reset

EPISODES = 10
RANDOM, STILL = "random actions", "no action (zeros)"
PATIENCE = 5.0  # seconds without a word while filming


@dataclass(frozen=True)
class Eval:
    """Returns of a trained policy, acting as in evaluation, on the environment it was trained on."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Folder of a run or of a policy."""
    episodes: int = 20
    seed: int = 0
    env: str | None = None
    """Another environment of the same sizes."""
    guide: tuple[float, ...] = ()
    """Also with its flow guided by its critic, once for each weight, in units of mean |Q| (docs/methods/qgf.md)."""
    video: Path | None = None
    """Also film one episode; the ending says how (.mp4, .gif)."""
    fps: int = 50
    """Frames per second of the video; one frame per environment step."""
    frames: int | None = None
    """Stop filming after so many; the whole episode unless given."""
    trust: Modules = ""
    """Modules outside the library that may be imported, with what lies below them; `all` is any of them."""

    def __post_init__(self):
        if min(self.episodes, self.fps, 1 if self.frames is None else self.frames) < 1 or self.seed < 0:
            raise ValueError("episodes, fps and frames must be at least 1, and seed not negative")


def eval_command(args: list[str]) -> int:
    """`contraflow eval FOLDER`: print the returns of a policy, and film it if asked; the exit code."""
    options = read_flags(Eval, args, prog="contraflow eval")
    policy = load(options.folder, options.seed, options.trust)
    id = options.env or policy.env
    if options.guide:
        guided(policy.network, 0.0)  # refused before anything runs
    if options.video:
        film(policy, id, options.seed, options.video, options.fps, options.frames)
        print(f"video  {options.video}")
    with environment(policy, id, min(options.episodes, 32), options.seed, options.trust) as env:
        for note in notes(env):
            print(f"note: {note}")
        returns = evaluate(policy.network, env, jr.key(options.seed), options.episodes)
        print(f"{id}, {options.episodes} episodes, seed {options.seed}")
        print(summary(returns))
        if options.guide:
            print_guided(policy.network, env, options)
    return 0


def print_guided(policy: base.Policy, env: Env, options: Eval) -> None:
    """A line for each weight of guidance, on the same episodes."""
    k_reset, k_act = jr.split(jr.key(options.seed))
    scale = float(value_scale(policy, reset(env, k_reset)[1], k_act))
    print(f"guided by Q, weights divided by mean |Q| = {scale:.4g} at first observations:")
    for weight in options.guide:
        part = guided(policy, weight / max(scale, 1e-6))
        print(f"{weight:<6g} {summary(evaluate(part, env, jr.key(options.seed), options.episodes))}")


def summary(returns: np.ndarray, width: int = 0) -> str:
    """Mean, with half the width of its 95 % interval where there is more than one episode, standard deviation and
    range of returns [episodes], each in `width` characters."""
    half = f" +- {margin(returns):.1f} (95 %)" if len(returns) > 1 else ""
    std, low, high = (f"{x:{width}.1f}" for x in (returns.std(), returns.min(), returns.max()))
    return f"mean {returns.mean():{width}.1f}{half}  std {std}  min {low}  max {high}"


def final_returns(folder: Path, trust: Trust, episodes: int = EPISODES, seed: int = 12_345) -> dict[str, np.ndarray]:
    """Returns [episodes] of the policies of a run and, for RFM, what is left without its choice or its actor.

    On episodes that training did not see, the same for all. The policy of the best evaluation comes first; then, with
    its networks, one particle instead of the best of many, and uniform actions ranked by the critic in place of the
    actor's; then the policy at the end of training, and two references: uniform actions, and none at all.
    """
    policy = load(folder / "best", trust=trust)
    names = {OWN: f"best policy, greedy, {episodes} episodes"}
    candidates = {names.get(rule, f"the same, {rule}"): part for rule, part in variants(policy).items()}
    candidates["last policy, greedy"] = load(folder, trust=trust).network
    candidates[RANDOM] = uniform_policy(policy.spec.action_dim)
    candidates[STILL] = still_policy(policy.spec.action_dim)
    with environment(policy, policy.env, episodes, seed, trust) as env:
        return {name: evaluate(candidate, env, jr.key(seed), episodes) for name, candidate in candidates.items()}


def film(policy: Policy, id: str, seed: int, path: Path, fps: int, most: int | None = None) -> None:
    """Write one episode of the policy, one frame per step of the environment, within a chunk of actions too; the first
    `most` of them.

    Raises UserError without the packages that it takes.
    """
    try:
        import imageio.v2 as imageio
    except ImportError:
        raise UserError('videos need imageio: pip install "contraflow[mujoco]"') from None
    make_folder(path.parent, "--video")
    speed: dict[str, Any] = {"duration": 1000 / fps, "loop": 0} if path.suffix == ".gif" else {"fps": fps}
    k_reset, k_act = jr.split(jr.key(seed))
    with environment(policy, id, 1, seed, render=True) as env:
        print(f"filming one episode of {id} ...", flush=True)
        state, obs = env.reset(k_reset)
        frames, said = 0, time.monotonic()
        try:
            with warnings.catch_warnings(), imageio.get_writer(path, **speed) as writer:
                # ffmpeg starts with the first frame: fork and exec at once, which is safe
                warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
                for i in range(env.spec.episode_length or 1000):
                    world, actions = singly(env, act_batch(policy.network, obs, k_act, i))
                    for action in actions:
                        writer.append_data(world.frame())  # pyright: ignore[reportAttributeAccessIssue]
                        state, step = world.step(state, action)
                        obs, frames = step.obs, frames + 1
                        if bool((step.terminated | step.truncated)[0]) or frames == most:
                            return
                        if time.monotonic() > said + PATIENCE:
                            print(f"{frames} frames ...", flush=True)
                            said = time.monotonic()
        except ValueError as error:  # no writer for this ending, or no ffmpeg
            raise UserError(f"{path} cannot be written ({error}); use .mp4 or .gif") from None
