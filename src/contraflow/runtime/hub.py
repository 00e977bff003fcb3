"""Trained policies as folders to share, on the Hugging Face hub or in any other place.

A folder holds the policy, its settings and evaluations, any exported files, a model card, and the normalisation of
observations and actions under the names of LeRobot's features and tensors. It holds no code. Only known files are
written and taken.

`model.safetensors` includes the normalisation. The files of the normaliser are for readers of other libraries, which
apply (x - mean) / (std + 1e-8) to observations and map actions in [-1, 1] to [min, max].
"""

import importlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from contraflow.core.bounds import action_range, range_text
from contraflow.core.files import make_folder, read_json, write_json, write_text
from contraflow.core.observation import shown
from contraflow.core.settings import version
from contraflow.core.types import EnvSpec, UserError
from contraflow.policy.artifact import policy_folder, revision
from contraflow.policy.base import inner, innermost
from contraflow.runtime.export import fresh_exports
from contraflow.runtime.policy import Policy

EPS = 1e-8  # which LeRobot adds to standard deviations
CARD, EVALUATION, RUN, SOURCE = "README.md", "eval.json", "train_config.json", "source.json"
NORMALISER = "policy_preprocessor_step_3_normalizer_processor.safetensors"
UNNORMALISER = "policy_postprocessor_step_0_unnormalizer_processor.safetensors"
FILES = (
    "config.json", "model.safetensors", "policy_preprocessor.json", "policy_postprocessor.json", NORMALISER,
    UNNORMALISER, "policy.onnx", "policy.stablehlo", EVALUATION, "eval.csv", RUN, CARD,
)  # fmt: skip
"""Every file that a shared folder may hold."""


@dataclass(frozen=True)
class Evaluation:
    """Returns of whole episodes that the policy did not see in training, with half of their 95 % interval.

    `success` is the share of episodes that solved the task, None where the environment does not say.
    """

    env: str
    episodes: int
    seed: int
    return_mean: float
    return_interval: float | None
    return_std: float
    success: float | None = None


def share(
    policy: Policy, path: Path, folder: Path, license: str, evaluation: Evaluation | None = None, note: str = ""
) -> list[str]:
    """Writes the policy, loaded from the run or policy folder `path`, to the new folder `folder`; returns its files.

    `license` is the one of the policy, such as apache-2.0, and `note` a sentence about task and data for the card.
    Raises UserError if `folder` already holds something.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} already holds something: choose another folder, or delete it")
    source = policy_folder(path)
    make_folder(folder, "--local")
    exports = fresh_exports(source)
    config = read_json(source / "config.json")
    config = {k: v for k, v in config.items() if k != "exports"} | ({"exports": exports} if exports else {})
    write_json(folder / "config.json", config | features(policy) | {"license": license})
    shutil.copyfile(source / "model.safetensors", folder / "model.safetensors")
    for about in exports.values():
        shutil.copyfile(source / about["file"], folder / about["file"])
    run = next((place for place in (path, path.parent) if (place / "policy").is_dir()), None)  # or a policy alone
    for name, target in (("eval.csv", "eval.csv"), ("config.json", RUN)):
        if run is not None and (run / name).is_file():
            shutil.copyfile(run / name, folder / target)
    _write_normalisers(policy, folder)
    if evaluation is not None:
        write_json(folder / EVALUATION, asdict(evaluation) | _acting(policy))
    write_text(folder / CARD, card(policy, license, evaluation, exports, _training(folder / RUN), note))
    return sorted(file.name for file in folder.iterdir())


def pull(source: Path, folder: Path) -> list[str]:
    """Copies the known files of a shared folder to the new folder `folder`; returns those that it left out.

    Raises UserError if `folder` already holds something, or `source` is no shared policy.
    """
    if not (source / "config.json").is_file():
        raise UserError(f"{source} holds no policy (config.json is missing)")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} already holds something: choose another folder, or delete it")
    make_folder(folder, "--out")
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    return sorted(file.name for file in source.iterdir() if file.name not in (*FILES, SOURCE))


@contextmanager
def downloaded(repo: str, wanted: str | None) -> Iterator[tuple[Path, str]]:
    """Yields the folder of the known files of `repo`, owner/name, at a revision (None is the newest), and its id."""
    hub = _hub()
    try:
        place = Path(hub.snapshot_download(repo, revision=wanted, allow_patterns=list(FILES)))
    except Exception as error:  # of the network, of the hub, or of the disk
        raise UserError(f"{repo} cannot be downloaded ({error}): check its name, and your login") from None
    yield place, place.name


def upload(folder: Path, repo: str, private: bool) -> str:
    """Uploads a shared folder to `repo`, owner/name, which is created if it does not exist; returns its address."""
    hub = _hub()
    try:
        hub.create_repo(repo, private=private, exist_ok=True)
        hub.upload_folder(repo_id=repo, folder_path=str(folder), commit_message=f"contraflow {version()}")
    except Exception as error:
        raise UserError(f"{repo} cannot be uploaded ({error}): log in with `hf auth login`") from None
    return f"https://huggingface.co/{repo}"


def check_repo(repo: str) -> None:
    """Raises UserError unless `repo` has the form owner/name."""
    if len(parts := repo.split("/")) != 2 or not all(parts) or any(part.startswith(".") for part in parts):
        raise UserError(f"{repo!r} is no place on the hub: give owner/name, or a folder by --local")


def features(policy: Policy) -> dict[str, Any]:
    """Returns the observations, the actions and their normalisation in the words of LeRobot's config.json."""
    spec = policy.spec
    inputs: dict[str, Any] = {"observation.state": {"type": "STATE", "shape": [spec.obs_dim]}}
    if spec.obs_parts:
        inputs = {
            _feature(part.name, part.image): {
                "type": "VISUAL" if part.image else "STATE",
                "shape": [part.shape[2], *part.shape[:2]] if part.image else list(part.shape),
            }
            for part in spec.obs_parts
        }
    state = "IDENTITY" if inner(policy.network, "stats") is None else "MEAN_STD"
    return {
        "type": "contraflow",
        "n_obs_steps": 1,
        "chunk_size": spec.horizon,
        "n_action_steps": spec.execute,
        "input_features": inputs,
        "output_features": {"action": {"type": "ACTION", "shape": [spec.action_dim // spec.horizon]}},
        "normalization_mapping": {"STATE": state, "VISUAL": "IDENTITY", "ACTION": "MIN_MAX"},
    }


def _feature(name: str, image: bool) -> str:
    if image:
        return f"observation.images.{name}".rstrip(".").replace("images.image", "image")
    return f"observation.{name or 'state'}"


def _write_normalisers(policy: Policy, folder: Path) -> None:
    """Writes the steps before and after the policy, with tensors named FEATURE.STATISTIC."""
    words, stats = features(policy), inner(policy.network, "stats")
    low, high = (bound.astype(np.float32) for bound in action_range(policy.spec))
    save_file({"action.min": low, "action.max": high}, folder / UNNORMALISER)
    if stats is not None:
        std = np.sqrt(np.asarray(stats.var) + EPS) - EPS  # so that the formula of LeRobot is that of `RunningMoments`
        tensors = {"mean": np.array(stats.mean), "std": std.astype(np.float32)}
        save_file({f"observation.state.{name}": x for name, x in tensors.items()}, folder / NORMALISER)
    common = {"eps": EPS, "norm_map": words["normalization_mapping"]}
    before = {"features": words["input_features"], **common}
    after = {"features": words["output_features"], **common}
    normalise: dict[str, Any] = {"registry_name": "normalizer_processor", "config": before}
    if stats is not None:
        normalise["state_file"] = NORMALISER
    write_json(
        folder / "policy_preprocessor.json",
        {
            "name": "policy_preprocessor",
            "steps": [
                {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}},
                {"registry_name": "to_batch_processor", "config": {}},
                {"registry_name": "device_processor", "config": {"device": "cpu", "float_dtype": None}},
                normalise,
            ],
        },
    )
    write_json(
        folder / "policy_postprocessor.json",
        {
            "name": "policy_postprocessor",
            "steps": [
                {"registry_name": "unnormalizer_processor", "config": after, "state_file": UNNORMALISER},
                {"registry_name": "device_processor", "config": {"device": "cpu", "float_dtype": None}},
            ],
        },
    )


def _acting(policy: Policy) -> dict[str, Any]:
    """Returns what of an evaluation is known from the policy: its revision, its chunks and the cost of an action."""
    cost = getattr(policy.network, "cost", None)
    return {
        "revision": revision(policy.network),
        "horizon": policy.spec.horizon,
        "executed": policy.spec.execute,
        "nfe": None if cost is None else cost.nfe,
        "particles": None if cost is None else cost.particles,
        "contraflow": version(),
    }


def _training(file: Path) -> list[tuple[str, str]]:
    """Returns rows of the card on the method and the data, from the settings of a run if there are any."""
    if not file.is_file():
        return []
    run = read_json(file)["run"]
    data, steps = run["source"].get("data"), f"{run['steps']:,} steps, seed {run['seed']}"
    return [("Method", f"{run['agent']['kind']}, {steps}"), ("Data", f"dataset {data}" if data else "its own episodes")]


def card(
    policy: Policy,
    license: str,
    evaluation: Evaluation | None,
    exports: dict[str, Any],
    training: list[tuple[str, str]],
    note: str = "",
) -> str:
    """Returns the model card in Markdown, with the header that the hub reads."""
    spec, about = policy.spec, _acting(policy)
    tags = "\n".join(f"- {tag}" for tag in ("reinforcement-learning", "flow-matching", "robotics"))
    header = (
        f"---\nlicense: {license}\nlibrary_name: contraflow\npipeline_tag: reinforcement-learning\ntags:\n{tags}\n---\n"
    )
    rows = [
        ("Task", policy.env or "no environment"),
        *training,
        ("Observations", shown(spec.observation)),
        ("Actions", _actions(spec)),
        ("Policy", f"{type(innermost(policy.network)).__name__}, revision {about['revision']}"),
        ("Cost of an action", _cost(about)),
        ("Licence", license),
        ("Exported files", ", ".join(_exported(e) for e in exports.values()) or "none"),
    ]
    table = "\n".join(["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows)])
    title = f"# {policy.env or 'Policy'}\n\n" + (f"{note}\n\n" if note else "")
    use = (
        '## Use\n\n```python\nimport contraflow\n\npolicy = contraflow.Policy.from_pretrained("path/to/this/folder")\n'
        "action = policy.raw(policy(observation))  # in the range of the robot\n```\n\n"
        f"Settings of training are in `{RUN}` and evaluations during training in `eval.csv`, if they were shared. "
        "`model.safetensors` includes any normalisation of observations, clipped to ten standard deviations. The files "
        "of the normaliser repeat it for other readers, who must not apply both.\n"
    )
    return f"{header}\n{title}{table}\n\n{_evaluated(evaluation, about)}\n{use}"


def _evaluated(evaluation: Evaluation | None, about: dict[str, Any]) -> str:
    if evaluation is None:
        return "## Evaluation\n\nThis policy was not evaluated when it was shared.\n"
    e = evaluation
    half = "" if e.return_interval is None else f" ± {e.return_interval:.1f} (95 % interval of the mean, Student's t)"
    done = "" if e.success is None else f" It succeeds in {e.success:.0%} of the episodes."
    steps = (
        f"the first {about['executed']} of {about['horizon']} actions of each chunk"
        if about["horizon"] > 1
        else "each action"
    )
    return (
        f"## Evaluation\n\nReturn {e.return_mean:.1f}{half}, standard deviation {e.return_std:.1f}.{done}\n\n"
        f"Measured with contraflow {about['contraflow']} on {e.env}: {e.episodes} whole episodes, seed {e.seed}, "
        f"greedy actions, {steps} executed. The interval is about these episodes and not about other training seeds.\n"
    )


def _actions(spec: EnvSpec) -> str:
    chunk = f", chunks of {spec.horizon} of which {spec.execute} are executed" if spec.horizon > 1 else ""
    return f"{spec.action_dim // spec.horizon} in {range_text(*action_range(spec))}{chunk}"


def _cost(about: dict[str, Any]) -> str:
    if about["nfe"] is None:
        return "unknown"
    many = f", for each of {about['particles']} candidates" if about["particles"] > 1 else ""
    return f"{about['nfe']} evaluations of the network (NFE){many}"


def _exported(about: dict[str, Any]) -> str:
    return f"`{about['file']}` (differs by {about['parity']:.1e} of half the range of an action)"


def _hub() -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError:
        raise UserError('the hub needs huggingface_hub: pip install "contraflow[hub]", or use --local') from None
