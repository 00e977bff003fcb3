"""Flow-DPO: which samples make a pair, the gradient for small beta, how it fades."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tests.agents.align.matching_helpers import flattened, gradient, groups, small, start, update

from contraflow.agents.align.base import batches, line
from contraflow.agents.align.flow_dpo import FlowDPO
from contraflow.core.optim import Optim
from contraflow.core.types import UserError

TIMES = 3
RANKS = jnp.array([[3.0, 1.0, 2.0, 0.0], [0.0, 3.0, 1.0, 2.0], [1.0, 0.0, 3.0, 2.0]])


def gaps(flow, scored, key, pairs):
    """|v - u|^2 of winners minus losers, [n, TIMES], with the pairs that RANKS implies and the draws of an update."""
    end, order = scored.draws.end, jnp.argsort(scored.total, 1)
    row = jnp.arange(3)[:, None]
    rows = end[row, order[:, ::-1][:, :pairs]], end[row, order[:, :pairs]]
    rows = jnp.repeat(scored.cond, pairs, 0), *(x.reshape(-1, 2) for x in rows)
    k_order, k_loss = jr.split(key)
    (cond, winner, loser), key = jax.tree.map(lambda x: x[0], batches(k_order, rows, 1)), jr.split(k_loss, 1)[0]

    def error(cond, x1, key):
        x, t, u = line(flow, x1, jr.clone(key))
        return jnp.sum((flow.velocity(x, t, cond) - u) ** 2)

    one = lambda cond, w, l, key: error(cond, w, key) - error(cond, l, key)
    return jax.vmap(jax.vmap(one, (None, None, None, 0)))(cond, winner, loser, jr.split(key, (len(cond), TIMES)))


@pytest.mark.parametrize("pairs", [1, 2])
def test_small_beta_matches_the_winner_and_unmatches_the_loser(pairs):
    """beta / 4 E grad (D(w) - D(l)) as beta -> 0, here to the order of beta; at the reference, for every beta."""
    flow, other, scored = small(jr.key(0)), small(jr.key(1)), groups(jr.key(2), reward=RANKS)
    mean = lambda flow: jnp.mean(gaps(flow, scored, jr.key(3), pairs))
    right = flattened(jax.grad(mean)(flow)) / 4
    for beta, old, tolerance in ((1e-4, other, 5e-3), (0.5, flow, 1e-5), (2.0, flow, 1e-5)):
        agent = FlowDPO(beta=beta, pairs=pairs, times=TIMES)
        found = flattened(gradient(agent, start(flow, Optim(), old=old), scored, jr.key(3))[0]) / beta
        np.testing.assert_allclose(found, right, atol=tolerance * jnp.abs(right).max(), rtol=0)


def test_the_loss_is_that_of_the_margins():
    """-log sigmoid(-(beta / 2) (D(w) - D(l))) with the reference inside, averaged over pairs and times."""
    flow, other, scored = small(jr.key(0)), small(jr.key(1)), groups(jr.key(2), reward=RANKS)
    margin = -0.5 * 0.7 * (gaps(flow, scored, jr.key(3), 1) - gaps(other, scored, jr.key(3), 1))
    agent = FlowDPO(beta=0.7, times=TIMES)
    _, metrics = gradient(agent, start(flow, Optim(), old=other), scored, jr.key(3))
    np.testing.assert_allclose(metrics["loss"], jnp.mean(-jax.nn.log_sigmoid(margin)), rtol=1e-4)
    np.testing.assert_allclose(metrics["margin"], jnp.mean(margin), rtol=1e-4)
    np.testing.assert_allclose(metrics["accuracy"], jnp.mean(margin > 0), rtol=1e-6)


def test_equal_rewards_are_no_preference():
    flow, scored = small(jr.key(0)), groups(jr.key(2), reward=jnp.ones((3, 4)))
    found, _ = gradient(FlowDPO(times=TIMES), start(flow, Optim()), scored, jr.key(3))
    assert not flattened(found).any()


def test_more_pairs_than_half_a_group_are_refused():
    state = start(small(jr.key(0)), Optim())
    with pytest.raises(UserError, match="groups of at least 6"):
        update(FlowDPO(pairs=3), state, groups(jr.key(2)), jr.key(3))
