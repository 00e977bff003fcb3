"""Checkpoints by name: fields that change places are read right, other names and shapes are refused."""

import shutil
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from contraflow import UserError
from contraflow.core.files import read_json, write_json
from contraflow.training import checkpoint

ABOUT = {"settings": {"agent": {"lr": 0.1}}, "data": None}


class Before(eqx.Module):
    critic: Any
    target: Any
    key: Any
    empty: Any


class Swapped(eqx.Module):
    target: Any
    critic: Any
    empty: Any
    key: Any


class Renamed(eqx.Module):
    critic: Any
    slow: Any
    key: Any
    empty: Any


STATE = Before({"w": jnp.arange(6.0).reshape(2, 3)}, {"w": -jnp.ones((2, 3))}, jr.key(3), jnp.zeros((0, 4)))


def shapes(state: Any) -> Any:
    return jax.eval_shape(lambda: state)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    checkpoint.save(folder, 7, STATE, ABOUT)
    return folder


def test_what_is_saved_comes_back(written: Path):
    back = checkpoint.load(written, 7, shapes(STATE), ABOUT)
    assert checkpoint.steps(written) == [7] and jax.tree.structure(back) == jax.tree.structure(STATE)
    np.testing.assert_array_equal(back.critic["w"], STATE.critic["w"])
    np.testing.assert_array_equal(jr.key_data(back.key), jr.key_data(jr.key(3)))
    assert back.empty.shape == (0, 4)


def test_swapping_two_fields_swaps_no_arrays(written: Path):
    back = checkpoint.load(written, 7, shapes(Swapped(STATE.target, STATE.critic, STATE.empty, STATE.key)), ABOUT)
    np.testing.assert_array_equal(back.critic["w"], STATE.critic["w"])
    np.testing.assert_array_equal(back.target["w"], STATE.target["w"])


@pytest.mark.parametrize(
    ("like", "message"),
    [
        (Renamed(STATE.critic, STATE.target, STATE.key, STATE.empty), "does not fit: it lacks slow/w"),
        (Before(STATE.critic, None, STATE.key, STATE.empty), "holds target/w, which this run does not have"),
        (
            Before({"w": jnp.zeros((2, 4))}, STATE.target, STATE.key, STATE.empty),
            r"holds critic/w as float32\[2, 3\] where this run needs float32\[2, 4\]",
        ),
    ],
)
def test_another_state_is_refused(like: Any, message: str, written: Path):
    with pytest.raises(UserError, match=f"checkpoint 7 .*{message}; it is from another version: start a new run"):
        checkpoint.load(written, 7, shapes(like), ABOUT)
    other = {"settings": {"agent": {"lr": 0.2}}, "data": None}
    with pytest.raises(UserError, match=r"; agent\.lr was 0\.1 and is 0\.2: start"):
        checkpoint.load(written, 7, shapes(like), other)


def test_a_renamed_field_may_be_migrated(written: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(checkpoint.RENAMED, "target/w", "slow/w")
    like = Renamed(STATE.critic, STATE.target, STATE.key, STATE.empty)
    np.testing.assert_array_equal(checkpoint.load(written, 7, shapes(like), ABOUT).slow["w"], STATE.target["w"])


def test_changed_data_are_refused(written: Path):
    with pytest.raises(UserError, match=r"the dataset or frozen policy of .* is not the one that checkpoint 7"):
        checkpoint.load(written, 7, shapes(STATE), ABOUT | {"data": "abc"})


def test_a_checkpoint_without_its_last_file_is_none(written: Path, tmp_path: Path):
    """The process died between the arrays and their contents: the one before counts, and the step is written anew."""
    shutil.copytree(written / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "checkpoints/7" / checkpoint.CONTENTS).unlink()
    assert checkpoint.latest(tmp_path) is None
    checkpoint.save(tmp_path, 7, STATE, ABOUT)
    assert checkpoint.latest(tmp_path) == 7


@pytest.mark.parametrize("change", [{"schema": 99}, {"arrays": 3}, {"files": None}])
def test_damaged_contents(change: dict, written: Path, tmp_path: Path):
    shutil.copytree(written / "checkpoints", tmp_path / "checkpoints")
    file = tmp_path / "checkpoints/7" / checkpoint.CONTENTS
    write_json(file, read_json(file) | change)
    with pytest.raises(UserError, match=r"cannot be read \(contents.json is damaged"):
        checkpoint.load(tmp_path, 7, shapes(STATE), ABOUT)


def test_the_first_edition_is_refused(tmp_path: Path):
    (tmp_path / "checkpoints/40").mkdir(parents=True)
    (tmp_path / "checkpoints/40/seal.json").write_text("{}")
    with pytest.raises(UserError, match="of an older release, which stored arrays without names"):
        checkpoint.latest(tmp_path)
