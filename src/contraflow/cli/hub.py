"""`contraflow push` and `contraflow pull`: trained policies as folders to share."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax.random as jr
import tyro

from contraflow.cli.flags import Modules, Switch, read_flags
from contraflow.core.files import write_json
from contraflow.core.types import UserError
from contraflow.envs import copies
from contraflow.runtime import hub
from contraflow.runtime.policy import Policy, load
from contraflow.runtime.variants import environment
from contraflow.training.evaluate import evaluate_one, margin


@dataclass(frozen=True)
class Push:
    """Evaluate a trained policy and share it with a model card, on the Hugging Face hub or as a plain folder."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Folder of a run or of a policy."""
    repo: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OWNER/NAME")] = ""
    """Place on the hub; leave it out with --local."""
    local: Path | None = None
    """Write this new folder and upload nothing."""
    license: str = "other"
    """Licence of the policy by its identifier on the hub, such as apache-2.0."""
    note: str = ""
    """A sentence on the task and the data for the model card."""
    episodes: int = 20
    """Episodes of the evaluation; 0 shares the policy without one."""
    seed: int = 12_345
    private: Annotated[bool, Switch] = False
    """Create a private place on the hub."""
    trust: Modules = ""
    """Modules outside the library that may be imported, separated by commas; `all` allows any."""

    def __post_init__(self):
        if min(self.episodes, self.seed) < 0:
            raise ValueError("episodes and seed must not be negative")
        if bool(self.repo) == (self.local is not None):
            raise ValueError("give either a place on the hub, OWNER/NAME, or a new folder by --local")


@dataclass(frozen=True)
class Pull:
    """Fetch a shared policy from the Hugging Face hub or from a folder, and check that it can be loaded.

    Only files of known names are taken, and none of them is code.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OWNER/NAME|FOLDER")]
    """Place on the hub, or an existing folder."""
    out: Path
    """New folder for the policy."""
    revision: str | None = None
    """Commit, branch or tag on the hub; the default is the newest."""
    trust: Modules = ""
    """Modules outside the library that may be imported, separated by commas; `all` allows any."""


def push_command(args: list[str]) -> int:
    """Runs `contraflow push FOLDER OWNER/NAME`; returns the exit code."""
    options = read_flags(Push, args, prog="contraflow push")
    if options.repo:
        hub.check_repo(options.repo)
    policy = load(options.folder, options.seed, options.trust)
    found = _evaluation(policy, options.episodes, options.seed, options.trust) if options.episodes else None
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.local or Path(temporary) / "policy"
        files = hub.share(policy, options.folder, folder, options.license, found, options.note)
        place = str(folder) if options.local else hub.upload(folder, options.repo, options.private)
    if found is not None:
        half = "" if found.return_interval is None else f" +- {found.return_interval:.1f} (95 %)"
        print(f"return   {found.return_mean:.1f}{half}, {found.episodes} episodes, seed {found.seed}")
    print(f"files    {', '.join(files)}")
    print(f"shared   {place}")
    return 0


def pull_command(args: list[str]) -> int:
    """Runs `contraflow pull OWNER/NAME --out FOLDER`; returns the exit code."""
    options = read_flags(Pull, args, prog="contraflow pull")
    if (local := Path(options.source)).is_dir():
        if options.revision:
            raise UserError(f"{local} is a folder and has no revisions: leave out --revision")
        left = hub.pull(local, options.out)
    else:
        hub.check_repo(options.source)
        with hub.downloaded(options.source, options.revision) as (place, revision):
            left = hub.pull(place, options.out)
        write_json(options.out / hub.SOURCE, {"repo": options.source, "revision": revision})
    policy = load(options.out, 0, options.trust)
    if left:
        print(f"left     {', '.join(left)}")
    print(f"policy   {policy!r}")
    print(f"folder   {options.out}")
    return 0


def _evaluation(policy: Policy, episodes: int, seed: int, trust: str) -> hub.Evaluation:
    """Returns the returns of the policy in its own environment."""
    with environment(policy, policy.env, copies(policy.env, min(episodes, 32), trust), seed, trust) as env:
        returns, success = evaluate_one(policy.network, env, jr.key(seed), episodes)
    half = margin(returns) if len(returns) > 1 else None
    share = None if success is None else float(success.mean())
    mean, std = float(returns.mean()), float(returns.std())
    return hub.Evaluation(policy.env, episodes, seed, mean, half, std, share)
