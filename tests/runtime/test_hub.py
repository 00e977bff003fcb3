"""Shared policies: what is written is complete, is read back as the same policy, and is no code."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from safetensors.numpy import load_file
from tests.cli_helpers import TINY, assert_refused, cli

import contraflow
from contraflow import EnvSpec, Part, Policy, UserError, train
from contraflow.flow.model import Ddim, FlowSpec
from contraflow.nets.velocity import ResidualMLP
from contraflow.policy.artifact import revision, save_policy
from contraflow.policy.flow import FlowPolicy
from contraflow.policy.normalise import Normalised, RunningMoments
from contraflow.runtime import hub
from contraflow.runtime.export import export
from contraflow.training.evaluate import evaluate_one, margin

SPEC = EnvSpec(3, 4, 1, None, False, horizon=2, execute=1, low=(-2.0, 0.1), high=(2.0, 0.7))
STATS = RunningMoments(jnp.array([1.0, 0.0, 50.0]), jnp.array([4.0, 0.0, 100.0]), jnp.asarray(10.0))
FLOW = FlowPolicy(FlowSpec(network=ResidualMLP(8, 1, 4), solver=Ddim(3)).init(jr.key(0), 4, 3))
OBS = np.random.default_rng(0).normal([1.0, 0.0, 50.0], [2.0, 1e-5, 10.0], (5, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A trained run."""
    folder = tmp_path_factory.mktemp("hub") / "run"
    train(TINY, folder, quiet=True)
    return folder


@pytest.fixture(scope="module")
def pushed(run: Path) -> Path:
    """The same run, shared."""
    flags = ["--license", "apache-2.0", "--note", "Learns to repeat what it sees.", "--episodes", "4", "--seed", "5"]
    code, out, err = cli("push", run, "--local", run.parent / "shared", *flags)
    assert code == 0 and err == "", err
    assert "4 episodes, seed 5" in out and f"shared   {run.parent / 'shared'}\n" in out
    return run.parent / "shared"


def saved(folder: Path, network=FLOW, spec: EnvSpec = SPEC) -> Policy:
    save_policy(folder, network, spec, "probe:action")
    return contraflow.load(folder, seed=3)


def act(path: Path) -> np.ndarray:
    return Policy.from_pretrained(path, seed=3)(np.ones((4, 1)))


def test_the_shared_policy_acts_as_the_trained_one(run: Path, pushed: Path, tmp_path: Path):
    assert np.array_equal(act(pushed), contraflow.load(run, seed=3)(np.ones((4, 1))))
    code, out, err = cli("pull", pushed, "--out", tmp_path / "mine")
    assert code == 0 and err == "" and "policy   Policy(" in out
    assert np.array_equal(act(tmp_path / "mine"), act(pushed))
    assert {file.name for file in (tmp_path / "mine").iterdir()} == {file.name for file in pushed.iterdir()}


def test_what_is_in_the_folder(run: Path, pushed: Path):
    names = {file.name for file in pushed.iterdir()}
    assert names == {
        "config.json", "model.safetensors", "policy_preprocessor.json", "policy_postprocessor.json", hub.UNNORMALISER,
        "eval.json", "eval.csv", "train_config.json", "README.md",
    }  # fmt: skip
    assert (pushed / "model.safetensors").read_bytes() == (run / "policy/model.safetensors").read_bytes()
    assert (pushed / "train_config.json").read_bytes() == (run / "config.json").read_bytes()
    assert (pushed / "eval.csv").read_bytes() == (run / "eval.csv").read_bytes()


def test_the_card_says_what_was_measured(run: Path, pushed: Path):
    policy = contraflow.load(run)
    with hub_environment(policy, 5) as env:
        returns = evaluate_one(policy.network, env, jr.key(5), 4).returns
    about = json.loads((pushed / "eval.json").read_text())
    assert about["return_mean"] == returns.mean() and about["return_interval"] == margin(returns)
    assert about["revision"] == revision(policy.network) and about["executed"] == 1 and about["episodes"] == 4
    text = (pushed / "README.md").read_text()
    assert text.startswith("---\nlicense: apache-2.0\nlibrary_name: contraflow\n")
    assert f"Return {returns.mean():.1f} ± {margin(returns):.1f} (95 % interval of the mean, Student's t)" in text
    for words in ("Learns to repeat what it sees.", "probe:obs-action", about["revision"], "4 whole episodes, seed 5"):
        assert words in text, words
    assert "| Method | SIR, 40 steps, seed 0 |\n| Data | its own episodes |" in text
    assert "0 evaluations of the network (NFE), for each of 32 candidates" in text


def hub_environment(policy: Policy, seed: int):
    from contraflow.runtime.variants import environment

    return environment(policy, policy.env, 4, seed)


def test_the_tensors_of_lerobot_give_the_same_actions(tmp_path: Path):
    """Their formulas by hand, around the policy inside the normalisation; a variance of 0 included."""
    policy = saved(tmp_path / "policy", Normalised(STATS, FLOW))
    hub.share(policy, tmp_path / "policy", tmp_path / "shared", "mit")
    steps = json.loads((tmp_path / "shared/policy_preprocessor.json").read_text())["steps"]
    file = f"policy_preprocessor_step_{[s['registry_name'] for s in steps].index('normalizer_processor')}"
    (before,) = (tmp_path / "shared").glob(f"{file}_normalizer_processor.safetensors")
    assert steps[3]["state_file"] == before.name and steps[3]["config"]["norm_map"]["STATE"] == "MEAN_STD"
    stats, bounds = load_file(before), load_file(tmp_path / "shared" / hub.UNNORMALISER)
    seen = (OBS - stats["observation.state.mean"]) / (stats["observation.state.std"] + steps[3]["config"]["eps"])
    saved(tmp_path / "bare")
    inner = contraflow.load(tmp_path / "bare", seed=3)(np.clip(seen, -10, 10))
    low, high = bounds["action.min"], bounds["action.max"]
    wanted = policy.raw(contraflow.load(tmp_path / "policy", seed=3)(OBS))
    np.testing.assert_allclose((inner + 1) / 2 * (high - low) + low, wanted, rtol=1e-4, atol=1e-4)


def test_features_in_the_words_of_lerobot(tmp_path: Path):
    said = hub.features(saved(tmp_path / "a"))
    assert said["input_features"] == {"observation.state": {"type": "STATE", "shape": [3]}}
    assert said["output_features"] == {"action": {"type": "ACTION", "shape": [2]}}
    assert (said["chunk_size"], said["n_action_steps"]) == (2, 1)
    assert said["normalization_mapping"]["STATE"] == "IDENTITY"
    parts = (Part("image", (12, 16, 3), "uint8"), Part("state", (3,)), Part("wrist", (8, 8, 3), "uint8"))
    size = sum(part.size for part in parts)
    found = hub.features(Policy(FLOW, EnvSpec(size, 2, 1, None, False, obs_parts=parts), "x"))["input_features"]
    assert found == {
        "observation.image": {"type": "VISUAL", "shape": [3, 12, 16]},
        "observation.state": {"type": "STATE", "shape": [3]},
        "observation.images.wrist": {"type": "VISUAL", "shape": [3, 8, 8]},
    }


def test_exports_are_shared_while_they_are_of_these_weights(tmp_path: Path):
    policy = saved(tmp_path / "policy")
    with jax.numpy_rank_promotion("allow"):
        found = export(policy, tmp_path / "policy", "stablehlo")
    hub.share(policy, tmp_path / "policy", tmp_path / "a", "mit")
    assert json.loads((tmp_path / "a/config.json").read_text())["exports"]["stablehlo"]["parity"] == found.parity
    assert (tmp_path / "a/policy.stablehlo").read_bytes() == found.file.read_bytes()
    assert "`policy.stablehlo` (differs by" in (tmp_path / "a/README.md").read_text()
    config = (tmp_path / "policy/config.json").read_text()
    other = saved(tmp_path / "policy", jax.tree.map(lambda x: 2.0 * x, FLOW))
    (tmp_path / "policy/config.json").write_text(config)
    hub.share(other, tmp_path / "policy", tmp_path / "b", "mit")
    assert not (tmp_path / "b/policy.stablehlo").exists()
    assert "exports" not in json.loads((tmp_path / "b/config.json").read_text())
    text = (tmp_path / "b/README.md").read_text()
    assert "| Exported files | none |" in text and "was not evaluated" in text


class Hub:
    """Stands in for huggingface_hub, with the layout of its cache: blobs, and snapshots of links to them."""

    def __init__(self, cache: Path):
        self.cache, self.created = cache, []
        self.module = SimpleNamespace(
            create_repo=self.create_repo, upload_folder=self.upload_folder, snapshot_download=self.snapshot_download
        )

    def place(self, repo: str) -> Path:
        return self.cache / f"models--{repo.replace('/', '--')}"

    def create_repo(self, repo_id, *, private, exist_ok):
        assert exist_ok
        self.created.append((repo_id, private))

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        place, commit = self.place(repo_id), f"{len(self.created):040x}"
        snapshot = place / "snapshots" / commit
        for folder in (place / "blobs", place / "refs", snapshot):
            folder.mkdir(parents=True, exist_ok=True)
        for i, file in enumerate(sorted(Path(folder_path).iterdir())):
            shutil.copyfile(file, place / f"blobs/{commit}{i}")
            (snapshot / file.name).symlink_to(f"../../blobs/{commit}{i}")
        (place / "refs/main").write_text(commit)

    def snapshot_download(self, repo_id, *, revision, allow_patterns):
        place = self.place(repo_id)
        if not place.exists():
            raise OSError(f"404: {repo_id}")
        assert "model.safetensors" in allow_patterns and not any("*" in pattern for pattern in allow_patterns)
        return str(place / "snapshots" / (revision or (place / "refs/main").read_text()))


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub(tmp_path / "cache")
    monkeypatch.setitem(sys.modules, "huggingface_hub", found.module)  # pyright: ignore
    return found


def test_to_the_hub_and_back(run: Path, stand_in: Hub, tmp_path: Path):
    code, out, err = cli("push", run, "me/walker", "--episodes", "0", "--private")
    assert code == 0 and err == "" and "shared   https://huggingface.co/me/walker\n" in out
    assert stand_in.created == [("me/walker", True)]
    snapshot = stand_in.cache / f"models--me--walker/snapshots/{1:040x}"
    assert np.array_equal(act(snapshot), act(run)), "the cache of the hub is a policy folder, links and all"
    code, out, err = cli("pull", "me/walker", "--out", tmp_path / "mine")
    assert code == 0 and err == "", err
    assert np.array_equal(act(tmp_path / "mine"), act(run))
    assert not any(file.is_symlink() for file in (tmp_path / "mine").iterdir())
    assert json.loads((tmp_path / "mine/source.json").read_text()) == {"repo": "me/walker", "revision": f"{1:040x}"}
    cli("push", run / "best", "me/walker", "--episodes", "0")
    best = stand_in.cache / f"models--me--walker/snapshots/{2:040x}"
    assert (best / "train_config.json").exists() and np.array_equal(act(best), act(run / "best"))
    assert cli("pull", "me/walker", "--revision", f"{1:040x}", "--out", tmp_path / "old")[0] == 0
    assert (tmp_path / "old/README.md").read_text() == (tmp_path / "mine/README.md").read_text()
    assert_refused(["pull", "me/nothing", "--out", str(tmp_path / "x")], "me/nothing cannot be downloaded", "404")


def test_no_code_is_taken(pushed: Path, tmp_path: Path):
    shutil.copytree(pushed, tmp_path / "theirs")
    for name in ("modeling.py", "weights.pkl", "sitecustomize.py"):
        (tmp_path / "theirs" / name).write_text("raise SystemExit('ran')")
    code, out, _ = cli("pull", tmp_path / "theirs", "--out", tmp_path / "mine")
    assert code == 0 and "left     modeling.py, sitecustomize.py, weights.pkl\n" in out
    assert {file.suffix for file in (tmp_path / "mine").iterdir()} == {".json", ".safetensors", ".csv", ".md"}
    config = json.loads((tmp_path / "theirs/config.json").read_text())
    config["policy"]["kind"] = "sitecustomize:Policy"
    (tmp_path / "theirs/config.json").write_text(json.dumps(config))
    assert_refused(["pull", str(tmp_path / "theirs"), "--out", str(tmp_path / "other")], "--trust sitecustomize")


def test_bad_use(run: Path, pushed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # pyright: ignore
    folder, full = str(run), str(pushed)
    assert_refused(["push", folder, "me/x", "--episodes", "0"], 'pip install "contraflow[hub]"', "--local")
    assert_refused(["pull", "me/x", "--out", str(tmp_path / "x")], 'pip install "contraflow[hub]"')
    assert_refused(["push", folder], "OWNER/NAME", "--local")
    assert_refused(["push", folder, "me/x", "--local", str(tmp_path / "x")], "OWNER/NAME", "--local")
    assert_refused(["push", folder, "walker"], "owner/name")
    assert_refused(["push", folder, "--local", full, "--episodes", "0"], "already holds something")
    assert_refused(["pull", full, "--out", full], "already holds something")
    assert_refused(["pull", full, "--out", str(tmp_path / "x"), "--revision", "1"], "leave out --revision")
    (tmp_path / "empty").mkdir()
    assert_refused(["pull", str(tmp_path / "empty"), "--out", str(tmp_path / "x")], "config.json is missing")
    with pytest.raises(UserError, match="contraflow pull me/walker --out FOLDER"):
        Policy.from_pretrained("me/walker")
