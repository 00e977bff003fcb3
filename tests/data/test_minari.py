"""Datasets on disk: written, read again and read by Minari; nothing half-written, whatever fails."""

import json
import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.data.data_helpers import LENGTHS, analytic, assert_same, lerobot, trajectories

from contraflow import UserError
from contraflow.core.flatten import ordered_leaves
from contraflow.data.datasets import minari as storage
from contraflow.data.datasets.dataset import GUESSED, join
from contraflow.data.datasets.readers import load
from contraflow.data.datasets.write import write
from contraflow.envs.base import flatten


@pytest.fixture(autouse=True)
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Minari's own folder."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "library"))
    return tmp_path / "library"


@pytest.mark.parametrize("kind", ["hdf5", "arrow", "parquet"])
@pytest.mark.parametrize("target", ["mine/known-v0", "folder/known", "known.npz"])
def test_written_and_read_again(kind: str, target: str, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    data = analytic(env="jax:pendulum", notes=["made up"])
    place = write(data, target, kind)
    assert place == (library / target if target.startswith("mine") else Path(target))
    again = load(target)
    assert_same(again, data, rounding=1e-6)
    assert again.notes == ("made up",)
    assert not list(tmp_path.rglob(".unfinished*")) and os.environ["MINARI_DATASETS_PATH"] == str(library)
    if place.is_dir():
        assert_same(load(place / "data"), data, rounding=1e-6)
    with pytest.raises(UserError, match="already exists"):
        write(data, target, kind)


def test_minari_reads_what_we_write():
    import minari
    from minari.namespace import list_local_namespaces

    write(analytic(), "mine/known-v0")
    assert list(minari.list_local_datasets()) == ["mine/known-v0"] and list_local_namespaces() == ["mine"]
    episodes = list(minari.load_dataset("mine/known-v0").iterate_episodes())
    assert [len(episode) for episode in episodes] == list(LENGTHS)
    np.testing.assert_array_equal(episodes[2].observations[:, 0], np.arange(20, 25))
    np.testing.assert_allclose(np.concatenate([e.actions[:, 0] for e in episodes]), np.linspace(-2, 4, 8), atol=1e-6)
    assert [bool(e.terminations[-1]) for e in episodes] == [False, True, False]
    assert [bool(e.truncations[-1]) for e in episodes] == [True, False, True]


def dictionaries(kind: str):
    """A Minari dataset with nested observations, as its own collector writes it."""
    import minari
    from gymnasium.spaces import Box, Dict, Tuple
    from minari.data_collector import EpisodeBuffer

    box = Box(-np.inf, np.inf, (2,), np.float32)
    buffers = []
    for part in trajectories():
        obs = part["obs"].astype(np.float32)
        buffers.append(
            EpisodeBuffer(
                observations={"z": 3 * obs, "a": (obs, 2 * obs), "2": 5 * obs, "10": 4 * obs},
                actions=part["action"].astype(np.float32),
                rewards=part["reward"], terminations=part["terminated"], truncations=0 * part["terminated"],
            )
        )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        minari.create_dataset_from_buffers(
            "theirs/known-v3", buffers, observation_space=Dict({"z": box, "a": Tuple([box, box]), "2": box, "10": box}),
            action_space=Box(-2, 4, (1,), np.float32), data_format=kind,
        )  # fmt: skip


@pytest.mark.parametrize("kind", ["hdf5", "arrow"])
def test_nested_observations_of_a_local_minari_set(kind: str):
    dictionaries(kind)
    data = load("theirs/known-v3")
    plain = analytic()
    seen = {"2": 5 * plain.obs, "10": 4 * plain.obs, "z": 3 * plain.obs, "a": (plain.obs, 2 * plain.obs)}
    np.testing.assert_array_equal(data.obs, flatten(seen, 8), "in the order of the environments")
    np.testing.assert_array_equal(data.obs[:, ::2], plain.obs[:, :1] * [4, 5, 1, 2, 3])
    np.testing.assert_array_equal(data.next_obs[:, 8:], 3 * plain.next_obs)
    np.testing.assert_allclose(data.action, plain.action, atol=1e-6)
    np.testing.assert_array_equal(data.terminated, plain.terminated)
    assert data.env is None and data.name == "theirs/known-v3"
    assert data.notes == ("2 trajectories are marked neither terminated nor truncated: they count as truncated",)


def test_a_tuple_of_eleven_and_keys_that_are_numbers():
    obs = {"b": tuple(np.full((1, 1), i) for i in range(11)), "2": [np.full((1, 1), 21)], "10": np.full((1, 1), 20)}
    assert [int(leaf[0, 0]) for leaf in ordered_leaves(obs)] == [20, 21, *range(11)]
    assert ordered_leaves({2: "b", 10: "a"}) == ["a", "b"], "as a file has them, whose keys are strings"


def test_what_is_not_known_is_not_written(tmp_path: Path):
    """Bounds that were the range of the data are not stated by the copy; a missing successor is not invented."""
    for target in ("set", "bounds.npz"):
        again = load(write(analytic(low=None, high=None), tmp_path / target))
        assert not again.stated and again.notes == (GUESSED,)
    short = join([part | {"obs": part["obs"][:-1]} for part in trajectories()], name="short", low=-2, high=4)
    again = load(write(short, tmp_path / "short.npz"))
    assert_same(again, short, rounding=1e-6)
    assert again.notes == short.notes
    with pytest.raises(UserError, match="short lacks the successor of 2 steps, which Minari's formats need: write"):
        write(short, tmp_path / "other")
    assert_same(load(write(short.with_successor(), tmp_path / "other")), short.with_successor(), rounding=1e-6)
    person = replace(short, human=np.arange(len(short)) % 2 == 0)
    again = load(write(person, tmp_path / "person.npz"))
    np.testing.assert_array_equal(again.human, person.human)
    assert person.digest() != short.digest() and again.with_successor().human is not None
    with pytest.raises(UserError, match="short says where a person took over"):
        write(person.with_successor(), tmp_path / "person")


def minari_metadata(**change):
    def damage(folder: Path):
        file = folder / "data" / "metadata.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))

    return damage


def without_terminations(folder: Path):
    import h5py

    with h5py.File(folder / "data" / "main_data.hdf5", "a") as file:
        del file["episode_1"]["terminations"]  # pyright: ignore[reportIndexIssue]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (without_terminations, "episode 1 has no terminations; record it with all of them"),
        (minari_metadata(total_steps=9), "holds 8 steps in 3 episodes, its metadata state 9 in 3: download or record"),
        (minari_metadata(data_format="zarr"), "has the format zarr; only hdf5, arrow, parquet are read"),
        (minari_metadata(data_format="arrow"), "holds 0 steps in 0 episodes"),
        (minari_metadata(action_space='{"type": "Discrete", "n": 3}'), "has Discrete actions; only continuous"),
        (minari_metadata(observation_space='{"type": "Text"}'), "has Text observations"),
        (minari_metadata(observation_space='{"type": "Box", "dtype": "uint8", "shape": [64, 64, 3]}'), "images"),
        (lambda folder: (folder / "data" / "main_data.hdf5").write_bytes(b"not this"), "is damaged"),
        (lambda folder: (folder / "data" / "main_data.hdf5").unlink(), "is damaged"),
    ],
)
def test_minari_sets_that_are_damaged(damage, words: str, tmp_path: Path):
    damage(write(analytic(), tmp_path / "set"))
    with pytest.raises(UserError) as refused:
        load(tmp_path / "set")
    assert words in str(refused.value) and "set-v0" in str(refused.value)


def test_a_download_that_fails_leaves_nothing_behind(library: Path, monkeypatch: pytest.MonkeyPatch):
    import minari

    def half(id: str):
        folder = Path(os.environ["MINARI_DATASETS_PATH"]) / id / "data"
        folder.mkdir(parents=True)
        (folder / "main_data.hdf5").write_bytes(b"half")
        raise ConnectionError("the host is down\nand a long story")

    monkeypatch.setattr(minari, "download_dataset", half)
    with pytest.raises(UserError, match=r"could not be downloaded \(the host is down\): check the id and the network"):
        load("theirs/known-v3")
    assert list(library.rglob("*")) == [] and os.environ["MINARI_DATASETS_PATH"] == str(library)
    with pytest.raises(UserError, match="there is no dataset"):
        load("theirs/known-v3", download=False)


def test_a_download_that_arrives(library: Path, monkeypatch: pytest.MonkeyPatch):
    import minari

    monkeypatch.setattr(minari, "download_dataset", lambda id: dictionaries("hdf5"))
    assert load("theirs/known-v3").obs.shape == (8, 10)
    assert sorted(path.name for path in library.iterdir()) == ["theirs"]
    monkeypatch.undo()
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(library))
    assert load("theirs/known-v3", download=False).obs.shape == (8, 10), "it stays"


@pytest.mark.parametrize("target", ["mine/known-v0", "folder", "known.npz"])
def test_a_write_that_fails_leaves_nothing_behind(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    def full(*args, **options):
        raise OSError("the disk is full")

    monkeypatch.setattr(np, "savez", full)
    monkeypatch.setattr("minari.dataset.minari_storage.MinariStorage.update_metadata", full)
    with pytest.raises(UserError, match=r"cannot be written \(the disk is full\); choose another place"):
        write(analytic(), target)
    assert [path for path in tmp_path.rglob("*") if path.name != "library"] == []


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(analytic(), tmp_path / "set")
    write(analytic(), tmp_path / "arrow", "arrow")
    robot = lerobot(tmp_path / "robot")
    monkeypatch.setitem(sys.modules, "h5py", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for attempt in (
        lambda: load(tmp_path / "set"),
        lambda: load(tmp_path / "arrow"),
        lambda: load(robot),
        lambda: write(analytic(), tmp_path / "new"),
        lambda: load("theirs/known-v3"),
    ):
        with pytest.raises(UserError, match=r'pip install "contraflow\[offline\]"'):
            attempt()
    assert not (tmp_path / "new").exists()
    write(analytic(), tmp_path / "plain.npz")


def test_ids_and_paths():
    assert all(map(storage.is_id, ("D4RL/door/human-v2", "mine-v0")))
    assert not any(map(storage.is_id, ("./mine-v0", "/mine-v0", "mine", "mine-v0/", "a.npz", Path("../x-v1"))))
