"""`contraflow eval`: returns and videos of a trained policy."""

import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax.random as jr
import tyro

from contraflow.cli.flags import Modules, read_flags
from contraflow.core.files import make_folder
from contraflow.core.trust import Trust
from contraflow.core.types import UserError
from contraflow.envs import close, copies, make
from contraflow.envs.base import Env, notes
from contraflow.envs.chunk import singly
from contraflow.policy import base
from contraflow.policy.base import act_batch
from contraflow.policy.best_of import chosen
from contraflow.policy.guided import guided
from contraflow.policy.uniform import still_policy, uniform_policy
from contraflow.policy.value import Judge, value_scale
from contraflow.runtime.asynchronous import Asynchronous, Late, Mode, play
from contraflow.runtime.policy import Policy, load
from contraflow.runtime.value import load_value
from contraflow.runtime.variants import OWN, environment, variants
from contraflow.training.evaluate import Episodes, evaluate_one, margin
from contraflow.training.loop import reset

EPISODES = 10
RANDOM, STILL = "random actions", "no action (zeros)"
PATIENCE = 5.0  # seconds between messages while filming


@dataclass(frozen=True)
class Eval:
    """Print the returns of a trained policy, acting as in evaluation, on the environment it was trained on."""

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Folder of a run or of a policy, or the address ws://host:port of a served one."""
    episodes: int = 20
    seed: int = 0
    env: str | None = None
    """Another environment with the same sizes."""
    guide: tuple[float, ...] = ()
    """Also evaluates the policy with its flow guided by a value, once for each weight (docs/how-to/guide-policy.md).
    Weights of a critic are in units of mean |Q|."""
    best_of: tuple[int, ...] = ()
    """Also evaluates the best of so many actions by the value, once for each number."""
    value: str = ""
    """What guides and chooses: the critic in a folder, or module:function. Without it the policy's own critic does."""
    video: Path | None = None
    """Also film one episode; the suffix sets the format (.mp4, .gif)."""
    fps: int = 50
    """Frames per second of the video; one frame per environment step."""
    frames: int | None = None
    """Stop filming after this many frames; the default is the whole episode."""
    hz: float | None = None
    """Also play one episode in real time at this many steps a second, while a thread plans the chunks."""
    mode: Mode = "switch"
    """In real time: how a new chunk follows the previous one (docs/how-to/real-time.md)."""
    late: Late = "repeat"
    """In real time: what is done when no action is planned; repeat the last, stop (zeros), or wait for the chunk."""
    execute: int | None = None
    """In real time: steps between the beginnings of two inferences; the default is the policy's own."""
    trust: Modules = ""
    """Modules outside the library that may be imported, separated by commas; `all` allows any."""

    def __post_init__(self):
        if min(self.episodes, self.fps, 1 if self.frames is None else self.frames) < 1 or self.seed < 0:
            raise ValueError("episodes, fps and frames must be at least 1, and seed not negative")
        if self.value and not (self.guide or self.best_of):
            raise ValueError("--value guides or chooses actions: give --guide WEIGHT or --best-of N with it")
        if self.hz is not None and not 0 < self.hz < float("inf"):
            raise ValueError(f"hz must be positive, got {self.hz}")


def eval_command(args: list[str]) -> int:
    """Runs `contraflow eval FOLDER`: prints the returns of a policy and films it on request; returns the exit code."""
    options = read_flags(Eval, args, prog="contraflow eval")
    policy = load(options.folder, options.seed, options.trust)
    id = options.env or policy.env
    value = None
    if options.guide or options.best_of:  # refused before anything runs
        value = load_value(options.value, policy, options.trust)
        _ = [guided(policy.network, weight, value) for weight in options.guide]
        _ = [chosen(policy.network, value, n) for n in options.best_of]
    act = None
    if options.hz is not None:
        act = Asynchronous(policy, options.mode, options.execute, options.late)
    if options.video:
        film(policy, id, options.seed, options.video, options.fps, options.frames)
        print(f"video  {options.video}")
    with environment(
        policy, id, copies(id, min(options.episodes, 32), options.trust), options.seed, options.trust
    ) as env:
        for note in notes(env):
            print(f"note: {note}")
        found = evaluate_one(policy.network, env, jr.key(options.seed), options.episodes)
        print(f"{id}, {options.episodes} episodes, seed {options.seed}")
        print(summary(found))
        if value is not None:
            print_valued(policy.network, value, env, options)
    if act is not None and options.hz is not None:
        env = make(id, 1, options.seed, trust=options.trust)
        try:
            total, timing = play(act, env, options.hz, options.seed)
        finally:
            act.close()
            close(env)
        print(f"in real time at {options.hz:g} Hz, {options.mode}: return {total:.1f}; {timing}")
    return 0


def print_valued(policy: base.Policy, value: Any, env: Env, options: Eval) -> None:
    """Prints a line for each weight of guidance and each number to choose from, on the same episodes."""

    def line(name: str, part: base.Policy) -> None:
        print(f"{name:<6} {summary(evaluate_one(part, env, jr.key(options.seed), options.episodes))}")

    scale = 1.0
    if options.guide:
        if isinstance(value, Judge):
            k_reset, k_act = jr.split(jr.key(options.seed))
            scale = float(value_scale(policy, value, reset(env, k_reset)[1], k_act))
            print(f"guided by Q, weights divided by mean |Q| = {scale:.4g} at first observations:")
        else:
            print(f"guided by {options.value}:")
        for weight in options.guide:
            line(f"{weight:g}", guided(policy, weight / max(scale, 1e-6), value))
    if options.best_of:
        print(f"the best of so many actions by {options.value or 'Q'}:")
        for n in options.best_of:
            line(str(n), chosen(policy, value, n))


def summary(found: Episodes, width: int = 0) -> str:
    """Returns mean, half its 95 % interval (for more than one episode), standard deviation and range of the returns,
    and the share of episodes with success if it is known. Each number takes `width` characters."""
    returns, success = found
    half = f" +- {margin(returns):.1f} (95 %)" if len(returns) > 1 else ""
    std, low, high = (f"{x:{width}.1f}" for x in (returns.std(), returns.min(), returns.max()))
    share = "" if success is None else f"  success {success.mean():.0%}"
    return f"mean {returns.mean():{width}.1f}{half}  std {std}  min {low}  max {high}{share}"


def final_returns(folder: Path, trust: Trust, episodes: int = EPISODES, seed: int = 12_345) -> dict[str, Episodes]:
    """Returns the episodes of a run's policies by name and, for RFM, of their ablations.

    All act on the same episodes, which training did not see. The policy of the best evaluation comes first. Its
    ablations follow: one particle instead of the best of many, and uniform actions ranked by the critic. Then come the
    policy at the end of training, and two references: uniform actions, and zero actions.
    """
    policy = load(folder / "best", trust=trust)
    names = {OWN: f"best policy, greedy, {episodes} episodes"}
    candidates = {names.get(rule, f"the same, {rule}"): part for rule, part in variants(policy).items()}
    candidates["last policy, greedy"] = load(folder, trust=trust).network
    candidates[RANDOM] = uniform_policy(policy.spec.action_dim)
    candidates[STILL] = still_policy(policy.spec.action_dim)
    with environment(policy, policy.env, copies(policy.env, episodes, trust), seed, trust) as env:
        return {name: evaluate_one(candidate, env, jr.key(seed), episodes) for name, candidate in candidates.items()}


def film(policy: Policy, id: str, seed: int, path: Path, fps: int, most: int | None = None) -> None:
    """Writes one episode of the policy as a video, with a frame per environment step, even within a chunk.

    Stops after `most` frames. Raises UserError if a package is missing or the format is unknown.
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
        except ValueError as error:  # no writer for this suffix, or no ffmpeg
            raise UserError(f"{path} cannot be written ({error}); use .mp4 or .gif") from None
