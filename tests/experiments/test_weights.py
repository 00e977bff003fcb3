"""The search for weights against known scores: what it finds, what it spends, and what it may report."""

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tests.cli_helpers import cli

from contraflow.core.types import EnvSpec, UserError
from contraflow.experiments.weights import Score, grid, search_weights
from contraflow.flow.model import Ddim, FlowSpec
from contraflow.nets.velocity import ResidualMLP
from contraflow.policy.artifact import load_policy, save_policy
from contraflow.policy.composed import Composed
from contraflow.policy.flow import FlowPolicy


def coin(chance, calls=None):
    """Episodes that succeed with the probability chance(weights); those of one seed have their luck in common."""

    def play(weights, episodes, seed):
        if calls is not None:
            calls.append((weights, episodes, seed))
        luck = np.random.default_rng(seed).random(episodes)
        own = np.random.default_rng([seed, round(1000 * weights[0])]).random(episodes)
        return np.where(luck < 0.5, luck * 2, own) < chance(weights)

    return play


def test_the_grid_holds_all_multiples_that_add_up_to_one():
    assert grid(2, 4) == [(0.0, 1.0), (0.25, 0.75), (0.5, 0.5), (0.75, 0.25), (1.0, 0.0)]
    assert len(grid(3, 10)) == 66 and np.allclose(np.sum(grid(3, 10), 1), 1)


@pytest.mark.parametrize("halving", [False, True])
def test_the_best_weight_is_found_and_the_cost_is_that_of_the_grid(halving):
    calls = []
    play = coin(lambda w: 0.9 - abs(w[0] - 0.3), calls)
    found = search_weights(play, grid(2), 400, 300, halving)
    assert abs(found.weights[0] - 0.3) < 0.11
    spent = [n for _, n, seed in calls if (seed == 0 or (halving and seed < 4))]
    assert 0.9 * 11 * 400 < sum(spent) <= 11 * 400
    assert max(s.episodes for s in found.tried.values()) == max(400, *(s.episodes for s in found.tried.values()))
    assert halving == (max(s.episodes for s in found.tried.values()) > 1.5 * 400)
    seeds = [seed for *_, seed in calls]
    fresh = [call for call in calls if call[2] == max(seeds)]
    assert {w for w, *_ in fresh} == {found.weights, (1.0, 0.0), (0.0, 1.0)} and all(n == 300 for _, n, _ in fresh)


def test_only_the_fresh_score_is_unbiased():
    """Eleven candidates of the same chance: the best of 50 episodes looks .07 to .09 better than it is, which is the
    expected maximum of eleven means, and the fresh score does not."""
    play = lambda weights, n, seed: np.random.default_rng([seed, round(10 * weights[0])]).random(n) < 0.6
    searched, fresh = [], []
    for seed in range(60):
        found = search_weights(play, grid(2), 50, 50, seed=1000 * seed)
        searched.append(found.tried[found.weights].mean)
        fresh.append(found.fresh.mean)
    simulated = np.random.default_rng(0).binomial(50, 0.6, (20_000, 11)).max(1).mean() / 50
    slack = 3 * np.sqrt(0.6 * 0.4 / 50 / 60)
    assert abs(np.mean(searched) - simulated) < slack < simulated - 0.6
    assert abs(np.mean(fresh) - 0.6) < slack


def test_the_gain_is_that_over_the_best_policy_alone_on_the_same_episodes():
    """Common luck leaves the difference: its interval is narrower than one of separate episodes."""
    found = search_weights(coin(lambda w: 0.9 - abs(w[0] - 0.3)), grid(2), 200, 400)
    assert np.isclose(found.gain.mean, found.fresh.mean - max(alone.mean for alone in found.alone))
    apart = np.hypot(found.fresh.half, max(found.alone, key=lambda score: score.mean).half)
    assert found.gain.half < apart
    assert Score.of(np.ones(20)).half > 0.05, "all twenty is not certainty"


def test_searches_that_make_no_sense_are_refused():
    play = coin(lambda w: 0.5)
    with pytest.raises(UserError, match="candidate"):
        search_weights(play, [])
    with pytest.raises(UserError, match="at least 8"):
        search_weights(play, grid(2), 7, halving=True)


def test_the_command_writes_a_policy(tmp_path):
    """It acts as the composition of the weights that won; what cannot be composed is refused."""
    spec = EnvSpec(1, 1, 1, None, True)
    for i in range(2):
        flow = FlowSpec(solver=Ddim(2), network=ResidualMLP(8, 1, 4)).init(jr.key(i), 1, 1)
        save_policy(tmp_path / str(i), FlowPolicy(flow), spec, "probe:obs-action")
    save_policy(tmp_path / "wide", FlowPolicy(flow), EnvSpec(2, 1, 1, None, True), "probe:obs-action")
    both = tmp_path / "0", tmp_path / "1"
    code, out, err = cli(
        "compose", *both, "--steps", "2", "--episodes", "4", "--fresh", "4", "--out", tmp_path / "both"
    )
    assert code == 0, err
    policy = load_policy(tmp_path / "both")[0]
    assert isinstance(policy, Composed) and " ".join(f"{w:g}" for w in policy.weights) in out.splitlines()[-3]
    assert jnp.isclose(policy.weights.sum(), 1) and out.count("+-") == 3 + 2 + 2
    for args, error in (
        (both[:1], "two or more"),
        ((*both, "--rule", "and"), "not searched"),
        ((*both, "--weights", "1"), "one weight"),
        ((both[0], tmp_path / "wide"), "trained for"),
    ):
        code, _, err = cli("compose", *args)
        assert code == 2 and error in err, err
