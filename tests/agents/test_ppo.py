"""PPO, ReinFlow, DPPO, FPO: exact ratios, closed forms of their chains, reductions to each other."""

from dataclasses import astuple, dataclass, replace
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from contraflow.agents.onpolicy.dppo import DIFFUSION, DPPO
from contraflow.agents.onpolicy.fpo import FPO, Draw, MatchedFlow, aspo
from contraflow.agents.onpolicy.ppo import PPO
from contraflow.agents.onpolicy.reinflow import ReinFlow
from contraflow.core.optim import Optim, check_positive
from contraflow.core.types import EnvSpec, Rollout, UserError
from contraflow.flow.kernel import log_prob
from contraflow.flow.model import Ddim, Flow, FlowSpec
from contraflow.nets.mlp import MLPSpec
from contraflow.nets.velocity import ResidualMLP
from contraflow.policy.normalise import RunningMoments
from contraflow.rl.advantage import gae
from contraflow.rl.advantage import normalise as normalise_advantage
from contraflow.rl.normalise import ReturnScale, normalise
from contraflow.rl.ppo import PPOSettings, Samples, _explained, _samples, clipped, passes

SPEC = EnvSpec(3, 2, 4, 10, True)
PASSES = PPOSettings(minibatches=2, epochs=2, critic=MLPSpec(16, 1))
FLOW = FlowSpec(network=ResidualMLP(16, 1, 8))
AGENTS = {
    "ppo": PPO(actor=MLPSpec(16, 1, "tanh"), ppo=replace(PASSES, normalise_obs="running")),
    "reinflow": ReinFlow(FLOW, ppo=PASSES),
    "reinflow-sum": ReinFlow(FLOW, ratio="sum", steps=2, anchor=0.1, ppo=PASSES),
    "dppo": DPPO(replace(DIFFUSION, solver=Ddim(6), network=FLOW.network), learned=3, ppo=PASSES),
    "fpo": FPO(FLOW, ppo=PASSES),
    "fpo++": FPO(FLOW, 4, "velocity", "sum", per_pair=True, trust="aspo", cap=5.0, ppo=PASSES),
}


SLOW = ("reinflow-sum", "fpo++")
NAMES = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in AGENTS]


def start(agent, key):
    return agent.init(key, SPEC)


@partial(jax.jit, static_argnums=0)
def _acts(agent, state, obs, keys):
    return jax.vmap(jax.vmap(agent.policy(state).sample))(obs, keys)[1]


def acted(agent, state, key, T=6, N=4):
    """The rows of a rollout under `state`; what is random but the actions comes from NumPy, which compiles nothing."""
    rng = np.random.default_rng(int(jr.key_data(key)[-1]))
    obs, following = (jnp.asarray(rng.normal(size=(T, N, 3)), jnp.float32) for _ in range(2))
    end, reward = jnp.asarray(rng.random((2, T, N)) < 0.2), jnp.asarray(rng.normal(size=(T, N)), jnp.float32)
    extras = _acts(agent, state, obs, jr.split(key, (T, N)))
    return Rollout(obs, extras, reward, following, end[0], end[1], jnp.ones((T, N), bool))


@jax.jit
def samples(state, r):
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (r.obs, r.extras, r.reward))
    obs, extras, advantage = flat
    return Samples(
        jax.vmap(lambda o: normalise(state.stats, o))(obs), extras, advantage, advantage, jnp.ones(len(advantage))
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_first_ratio_is_one(name: str):
    """What acting remembered is what the update computes anew: any other grid, clip or clamp would show here."""
    agent = AGENTS[name]
    state = start(agent, jr.key(0))
    r = acted(agent, state, jr.key(1))
    args = (state.reference,) if name.startswith("reinflow") else ()
    loss, metrics = jax.jit(lambda a, b, k: agent._surrogate(a, b, k, *args))(state.actor, samples(state, r), jr.key(2))
    assert metrics["clip_share"] == 0 and abs(float(metrics["kl"])) < 1e-6
    assert np.isfinite(loss)


def test_the_first_minibatch_of_an_update():
    """One pass in one minibatch: the policy that acted is the one that learns, whatever the statistics are."""
    agent = AGENTS["ppo"]
    agent = replace(agent, ppo=replace(agent.ppo, epochs=1, minibatches=1))
    state = start(agent, jr.key(0))
    state = replace(
        state, stats=RunningMoments(jnp.array([1.0, -2.0, 0.5]), jnp.array([4.0, 0.25, 1.0]), jnp.asarray(9.0))
    )
    r = acted(agent, state, jr.key(1))
    new, metrics = jax.jit(agent.update)(state, r, jr.key(2))
    assert abs(float(metrics["kl"])) < 1e-6 and metrics["clip_share"] == 0
    assert new.stats.count == 9 + 24


@pytest.mark.parametrize("name", NAMES)
def test_an_update_moves_what_it_should(name: str):
    agent = AGENTS[name]
    state = start(agent, jr.key(0))
    r = acted(agent, state, jr.key(1))
    new, metrics = jax.jit(agent.update)(state, r, jr.key(2))
    assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, state)  # weak types too: nothing compiles twice
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state, new)
    assert all(x > 0 for x in jax.tree.leaves(moved.critic)) and max(jax.tree.leaves(moved.actor)) > 0
    assert new.step == 1 and all(np.isfinite(float(x)) for x in metrics.values())
    assert metrics["updates"] == 4
    if new.reference is not None:
        assert max(jax.tree.leaves(moved.reference)) == 0
    assert (new.stats is None) == (agent.ppo.normalise_obs == "off")
    assert new.stats is None or max(jax.tree.leaves(moved.stats)) > 0


def test_what_an_update_learns_from():
    """Row by row: values of normalised observations, V(s') of the true successor unless that terminated, A + V."""
    agent = AGENTS["ppo"]
    stats = RunningMoments(jnp.array([1.0, -2.0, 0.5]), jnp.array([4.0, 0.25, 1.0]), jnp.asarray(9.0))
    state = replace(start(agent, jr.key(0)), stats=stats)
    r = acted(agent, state, jr.key(1))
    assert (r.terminated & ~r.truncated).any() and (r.truncated & ~r.terminated).any()
    got = jax.jit(lambda s, r: _samples(s, r, r.reward, 0.9, 0.8))(state, r)
    scaled = [(np.asarray(x) - np.asarray(stats.mean)) / np.sqrt(np.asarray(stats.var)) for x in (r.obs, r.next_obs)]
    np.testing.assert_allclose(got.obs, scaled[0].reshape(-1, 3), rtol=1e-4, atol=1e-5)
    value, following = (np.asarray(jax.jit(jax.vmap(jax.vmap(state.critic)))(x))[..., 0] for x in scaled)
    wanted = np.zeros((6, 4))
    for n in range(4):
        later = 0.0
        for t in reversed(range(6)):
            step = float(r.reward[t, n]) - value[t, n] + (0.0 if r.terminated[t, n] else 0.9 * following[t, n])
            later = step + (0.0 if r.terminated[t, n] or r.truncated[t, n] else 0.72 * later)
            wanted[t, n] = later
    np.testing.assert_allclose(got.target, (wanted + value).ravel(), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(got.advantage, ((wanted - wanted.mean()) / wanted.std()).ravel(), rtol=1e-3, atol=1e-4)


def test_the_share_that_the_critic_explains():
    """1 for V + 3, of which it knows all but the level; 1 - .25 / 1.25 for V and independent noise of half its size."""
    state = start(AGENTS["ppo"], jr.key(0))
    obs, weight = jr.normal(jr.key(1), (4000, 3)), jnp.ones(4000).at[:10].set(0)
    value = jax.vmap(state.critic)(obs)[:, 0]
    noise = 0.5 * value.std() * jr.normal(jr.key(2), (4000,))
    share = lambda target: float(_explained(state, Samples(obs, None, target, target.at[:10].set(1e3), weight)))
    np.testing.assert_allclose(share(value + 3), 1.0, atol=1e-4)
    np.testing.assert_allclose(share(value + noise), 0.8, atol=0.02)  # 4000 rows: about .006


@pytest.mark.parametrize("name", NAMES)
def test_what_dummy_rows_hold_changes_nothing(name: str):
    """A simulator that resets in a step of its own leaves a row between two episodes that never happened."""
    agent = AGENTS[name]
    state = start(agent, jr.key(0))
    r = acted(agent, state, jr.key(1))
    end, at = r.terminated | r.truncated, jnp.zeros((6, 4), bool).at[3, 1].set(True)
    r = replace(
        r, terminated=r.terminated.at[2, 1].set(True) & ~at, truncated=r.truncated & ~at, valid=~at,
        reward=jnp.where(at, 0.0, r.reward),
    )  # fmt: skip
    other = replace(r, obs=r.obs.at[3, 1].set(7.0), next_obs=r.next_obs.at[3, 1].set(-5.0))
    other = replace(other, extras=jax.tree.map(lambda x: x.at[3, 1].set(x[0, 0]), r.extras))
    assert end.any()
    update = jax.jit(agent.update)
    (one, metrics), (two, others) = update(state, r, jr.key(2)), update(state, other, jr.key(2))
    jax.tree.map(np.testing.assert_array_equal, one, two)
    assert metrics["kl"] == others["kl"], "which may end the passes"


ROWS = 12


def visits(key, kl: float, target_kl: float | None):
    """(row by row in the order of the visits, -1 where there was none; metrics) of three passes over 12 rows by 3s,
    in which the k-th step moves the policy by k `kl`."""

    def step(nets, batch, key):
        order, taken = nets
        order = jax.lax.dynamic_update_slice(order, batch, (3 * taken,))
        return (order, taken + 1), {"kl": kl * (taken + 1.0)}

    start = jnp.full(3 * ROWS, -1), jnp.zeros((), jnp.int32)
    run = jax.jit(lambda key: passes(step, start, jnp.arange(ROWS), key, 3, 4, target_kl))
    (order, _), metrics = run(key)
    return np.asarray(order), {name: float(x) for name, x in metrics.items()}


def test_passes_go_over_all_rows_in_new_orders():
    order, metrics = visits(jr.key(0), 1.0, None)
    rounds = order.reshape(3, ROWS)
    assert all(sorted(one) == list(range(ROWS)) for one in rounds.tolist())
    assert len({tuple(one) for one in rounds.tolist()}) == 3 and rounds[0].tolist() != list(range(ROWS))
    assert metrics == {"kl": pytest.approx(6.5), "updates": 12}


def test_passes_end_once_the_policy_has_moved_too_far():
    """The step that went too far is the last; metrics are means over the steps that were taken."""
    order, metrics = visits(jr.key(0), 0.1, 0.45)
    assert (order[: 3 * 5] >= 0).all() and (order[3 * 5 :] == -1).all()
    assert metrics == {"kl": pytest.approx(0.3), "updates": 5}


def test_dppo_discounts_the_steps_before_the_last():
    """The last step has the advantage itself, each one before it gamma times less; clips grow towards the last."""
    agent = replace(AGENTS["dppo"], gamma_denoise=0.5, clip=0.9, clip_first=0.3, min_std=0.3)
    state = start(agent, jr.key(1))
    new = jax.tree.map(lambda w: w + 0.1 * jr.normal(jr.key(5), w.shape), state.actor)
    batch = samples(state, acted(agent, state, jr.key(3)))
    loss, _ = jax.jit(lambda a: agent._surrogate(a, batch, jr.key(4)))(new)

    def log_ratio(obs, draw):
        kernel = agent.policy(replace(state, actor=new)).learned_kernel(obs)
        return jnp.mean(log_prob(kernel, draw.chain, range(3)) - draw.log_prob, -1)

    ratios = jax.jit(jax.vmap(log_ratio))(batch.obs, batch.extras)
    by_hand = 0.0
    for k, (discount, clip) in enumerate([(0.25, 0.3), (0.5, 0.3 + 0.6 * (np.e**1.5 - 1) / (np.e**3 - 1)), (1.0, 0.9)]):
        by_hand += float(jnp.mean(clipped(ratios[:, k], discount * batch.advantage, clip))) / 3
    np.testing.assert_allclose(loss, by_hand, rtol=1e-4)
    mirrored = sum(float(jnp.mean(clipped(ratios[:, k], 0.5**k * batch.advantage, 0.9))) / 3 for k in range(3))
    assert abs(mirrored - by_hand) > 1e-2 * abs(by_hand)


def test_fpo_weighs_by_the_error_of_the_noise():
    """As released: t^2 |v - (a - e)|^2 is |e' - e|^2 for the noise e' = x_t - t v that the velocity implies."""
    agent = AGENTS["fpo"]
    policy = agent.policy(start(agent, jr.key(0)))
    obs, end = jnp.ones(3), jnp.array([0.3, -0.6])
    t, noise = jnp.array([0.1, 0.5, 0.95]), jr.normal(jr.key(1), (3, 2))
    got = policy.losses(obs, end, t, noise)
    for loss, time, x0 in zip(got, t, noise, strict=True):
        x_t = time * end + (1 - time) * x0
        told = x_t - time * policy.flow.velocity(x_t, time, obs)
        np.testing.assert_allclose(loss, jnp.mean((told - x0) ** 2), rtol=1e-4)
    assert agent.weight == policy.weight == "noise"


def test_dummy_rows_have_no_part_in_advantages():
    """Neither in their mean nor in their deviation."""
    x, weight = jnp.array([1.0, 2.0, 4.0, 1e3, -7e4]), jnp.array([1.0, 1.0, 1.0, 0.0, 0.0])
    got = np.asarray(normalise_advantage(x, weight))[:3]
    np.testing.assert_allclose(got, (np.array([1, 2, 4]) - 7 / 3) / np.std([1, 2, 4]), rtol=1e-5)
    lone = normalise_advantage(jnp.array([5.0, 99.0]), jnp.array([1.0, 0.0]))
    assert lone[0] == 0, "the one row that counts is the mean itself"


def test_the_scale_of_rewards_is_that_of_returns_within_episodes():
    """g_t = gamma g_{t-1} + r_t begins anew after an end, is carried over rollouts, and dummy rows do not count."""
    rng = np.random.default_rng(0)
    reward, done = rng.normal(3.0, 1.0, (8, 2)), rng.random((8, 2)) < 0.3
    assert done.any(0).all() and not done[3].any()  # an episode goes on from the first rollout to the second
    valid = np.ones((8, 2), bool)
    valid[5, 1], reward[5, 1] = False, 0.0
    g, returns = np.zeros(2), []
    for r, d in zip(reward, done, strict=True):
        g = 0.9 * g + r
        returns.append(g)
        g = np.where(d, 0.0, g)
    scale = ReturnScale.start(2)
    for part in (slice(0, 4), slice(4, 8)):
        arrays = (jnp.asarray(x[part]) for x in (reward.astype(np.float32), done, valid))
        scale = scale.update(*arrays, gamma=0.9)
    np.testing.assert_allclose(scale.running, g, rtol=1e-5)
    counted = np.stack(returns)[valid]
    mean, n = counted.mean(), valid.sum()
    # Beside them a row of mean 0 and variance 1, with which the statistics begin.
    var = (1.0 + ((counted - mean) ** 2).sum() + mean**2 * n / (n + 1)) / (n + 1)
    np.testing.assert_allclose(scale.stats.var[0], var, rtol=1e-5)
    np.testing.assert_allclose(scale(jnp.ones((1, 2))), 1 / np.sqrt(var), rtol=1e-5)


BANDIT = EnvSpec(1, 1, 128, 1, True)
LEVEL = PPO(
    actor=MLPSpec(16, 1, "tanh"),
    ppo=replace(PASSES, epochs=4, actor_optim=Optim(1e-2, max_grad_norm=0.5), critic_optim=Optim(1e-2)),
)


def test_a_level_that_all_rewards_share_hides_nothing():
    """Reward 300 - 10 (a - .5)^2, one step: the actor has a gradient throughout and finds .5.

    Rewards clipped after scaling would all be the same, and the gradient 0.
    """

    def step(state, key):
        k_act, k_update = jr.split(key)
        obs, flags = jnp.zeros((1, 128, 1)), jnp.ones((1, 128), bool)
        action, extras = jax.vmap(jax.vmap(LEVEL.policy(state).sample))(obs, jr.split(k_act, (1, 128)))
        reward = 300 - 10 * (action[..., 0] - 0.5) ** 2
        return LEVEL.update(state, Rollout(obs, extras, reward, obs, flags, ~flags, flags), k_update)

    @jax.jit
    def run(key):
        k_init, k_run = jr.split(key)
        state, metrics = jax.lax.scan(step, LEVEL.init(k_init, BANDIT), jr.split(k_run, 80))
        return LEVEL.policy(state)(jnp.zeros(1), key), metrics["actor_grad_norm"]

    with jax.debug_key_reuse(False):  # the greedy action draws nothing
        runs = [run(jr.key(seed)) for seed in range(3)]
    for greedy, norms in runs:
        assert norms.min() > 1e-3
        np.testing.assert_allclose(greedy, [0.5], rtol=0.2)


def test_gae_by_hand():
    """Two environments: one terminates, one is truncated; nothing leaks from the next episode, and a cut bootstraps."""
    reward = jnp.array([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    value, following = jnp.full((3, 2), 0.5), jnp.full((3, 2), 10.0)
    terminated = jnp.array([[False, False], [True, False], [False, False]])
    truncated = jnp.array([[False, False], [False, True], [False, False]])
    got = gae(reward, value, following, terminated, truncated, 0.9, 0.8)
    last = 3 + 9 - 0.5
    np.testing.assert_allclose(got[2], [last, last], rtol=1e-6)
    np.testing.assert_allclose(got[1], [2 - 0.5, 2 + 9 - 0.5], rtol=1e-6)
    np.testing.assert_allclose(got[0], [9.5 + 0.72 * 1.5, 9.5 + 0.72 * 10.5], rtol=1e-6)


class Pull(eqx.Module):
    """v(x, t, s) = mu(s) - x: one step of size one goes to mu(s), wherever it began."""

    weight: jax.Array

    @property
    def dim(self):
        return self.weight.shape[1]

    def __call__(self, x, t, cond):
        return cond @ self.weight - x


def test_reinflow_with_one_step_is_gaussian_ppo():
    """Same means and deviations: same ratios, same surrogate, whatever x_0 was."""
    std, weight = 0.2, jr.normal(jr.key(0), (3, 2))
    agent = ReinFlow(FLOW, steps=1, ratio="sum", std=(std, std), entropy=0.0, clip=0.2, ppo=PASSES)
    state = start(agent, jr.key(1))
    old = replace(state.actor, flow=Flow(Pull(weight), agent.flow))
    new = eqx.tree_at(lambda a: a.flow.net.weight, old, weight + 0.05 * jr.normal(jr.key(2), weight.shape))
    state = replace(state, actor=old)
    r = acted(agent, state, jr.key(3))
    batch = samples(state, r)
    loss, metrics = jax.jit(lambda a: agent._surrogate(a, batch, jr.key(4), None))(new)

    x = batch.extras.chain[:, 1]

    def log_density(w):
        return jnp.sum(-0.5 * ((x - batch.obs @ w) / std) ** 2, 1)

    ratio = jnp.exp(log_density(new.flow.net.weight) - log_density(weight))
    wanted = -jnp.minimum(ratio * batch.advantage, jnp.clip(ratio, 0.8, 1.2) * batch.advantage).mean()
    np.testing.assert_allclose(loss, wanted, rtol=1e-4)
    np.testing.assert_allclose(metrics["clip_share"], jnp.mean(jnp.abs(ratio - 1) > 0.2), rtol=1e-6)
    assert 0.05 < metrics["clip_share"] < 0.95


def test_the_mean_ratio_is_the_true_one_spread_over_its_factors():
    """log rho / (K n), also for densities far above 1: small deviations are where a clamp would stop all learning."""
    agent = ReinFlow(FLOW, steps=2, std=(0.02, 0.02), entropy=0.0, ppo=PASSES)
    state = start(agent, jr.key(1))
    new = eqx.tree_at(lambda a: a.flow.net.last.bias, state.actor, jnp.array([0.002, -0.001]))
    r = acted(agent, state, jr.key(3))
    batch = samples(state, r)

    def log_ratio(a):
        def one(obs, draw):
            return jnp.sum(log_prob(a.kernel(obs), draw.chain, range(2)) - draw.log_prob)

        return jax.vmap(one)(batch.obs, batch.extras)

    true = jax.jit(log_ratio)(new)
    assert float(jnp.abs(true).max()) > 0.02
    for ratio, factors in (("sum", 1.0), ("mean", 4.0)):
        kl = jnp.mean(jnp.exp(true / factors) - 1 - true / factors)
        chosen = replace(agent, ratio=ratio)
        metrics = jax.jit(lambda a, chosen=chosen: chosen._surrogate(a, batch, jr.key(4), None)[1])(new)
        # kl is a difference of numbers near 1: float32 leaves it 1e-7.
        np.testing.assert_allclose(metrics["kl"], kl, rtol=0.05, atol=1e-6)


def test_dppo_with_one_step_is_gaussian_ppo():
    """Learning only the last step: N(predicted x1, min_std^2), for the x that the others led to."""
    agent = replace(AGENTS["dppo"], learned=1, ratio="sum", gamma_denoise=0.5, clip=0.2, min_std=0.3)
    state = start(agent, jr.key(1))
    new = jax.tree.map(lambda w: w + 0.1 * jr.normal(jr.key(5), w.shape), state.actor)
    r = acted(agent, state, jr.key(3))
    batch = samples(state, r)
    loss, metrics = jax.jit(lambda a: agent._surrogate(a, batch, jr.key(4)))(new)
    t = jnp.asarray(5 / 6)

    def log_density(flow):
        before, x = batch.extras.chain[:, 0], batch.extras.chain[:, 1]
        x1, _ = jax.vmap(lambda b, o: flow.ends(b, t, o))(before, batch.obs)
        return jnp.sum(-0.5 * ((x - x1) / 0.3) ** 2, 1)

    ratio = jnp.exp(log_density(new) - log_density(state.actor))
    wanted = -jnp.minimum(ratio * batch.advantage, jnp.clip(ratio, 0.8, 1.2) * batch.advantage).mean()
    np.testing.assert_allclose(loss, wanted, rtol=1e-3)
    assert 0.0 < metrics["clip_share"] < 1.0


def test_reinflow_without_noise_is_the_ode():
    """As sigma -> 0 acting in training becomes acting in evaluation, from the same x_0."""
    agent = ReinFlow(FLOW, std=(1e-6, 1e-6), ppo=PASSES)
    state = start(agent, jr.key(0))
    obs, key = jnp.ones(3), jr.key(1)
    _, draw = agent.policy(state).sample(obs, key)
    x1 = state.actor.flow.sample(draw.chain[0], obs, steps=agent.steps)
    np.testing.assert_allclose(draw.chain[-1], x1, rtol=1e-4, atol=1e-5)  # four draws of 1e-6


def test_noise_stays_within_its_bounds_and_its_reach_falls():
    agent = ReinFlow(FLOW, std=(0.1, 0.3), std_end=0.5, std_rollouts=100, ppo=PASSES)
    state = start(agent, jr.key(0))
    wild = jax.tree.map(lambda w: 2 * jr.normal(jr.key(1), w.shape), state.actor.noise)
    actor = replace(state.actor, noise=wild)
    std = jax.vmap(lambda o: actor.std(jnp.asarray(2), o))(20 * jr.normal(jr.key(2), (50, 3)))
    assert std.min() >= 0.0999 and std.max() <= 0.3001 and std.max() - std.min() > 0.1
    reach = [float(jnp.exp(0.5 * agent._reach(n))) for n in (0, 35, 67.5, 100, 200)]
    np.testing.assert_allclose(reach, [0.3, 0.3, 0.25, 0.2, 0.2], rtol=1e-5)


class GaussianFlow(eqx.Module):
    """The velocity of the flow to N(mean, std^2), whatever the condition."""

    mean: jax.Array
    std: float = eqx.field(static=True, default=0.5)

    @property
    def dim(self):
        return self.mean.shape[0]

    def __call__(self, x, t, cond):
        t = t / FLOW.clock
        var = t**2 * self.std**2 + (1 - t) ** 2
        return self.mean + (t * self.std**2 - (1 - t)) / var * (x - t * self.mean)


@pytest.mark.parametrize(("weight", "exact"), [("elbo", True), ("velocity", False)])
def test_fpo_ratio_against_the_density(weight: str, exact: bool):
    """With the ELBO's weight and sums, the ratio between two Gaussian flows is that of their densities."""
    pairs = 20_000
    old, new = GaussianFlow(jnp.array([0.0, 0.1])), GaussianFlow(jnp.array([0.4, -0.3]))
    t = jr.uniform(jr.key(0), (pairs,), minval=1e-3, maxval=1 - 1e-3)
    noise = jr.normal(jr.key(1), (pairs, 2))
    losses = lambda net, x: MatchedFlow(Flow(net, FLOW), pairs, weight, "sum").losses(jnp.zeros(3), x, t, noise)
    for x in (jnp.array([0.3, 0.2]), jnp.array([-0.5, 0.4])):
        log_ratio = jnp.mean(losses(old, x) - losses(new, x))
        true = 0.5 * jnp.sum(((x - old.mean) / 0.5) ** 2 - ((x - new.mean) / 0.5) ** 2)
        assert (abs(float(log_ratio - true)) < 0.045) == exact  # nats: the noise of 20 000 pairs


def test_fpo_survives_an_outlier():
    """The ELBO's weight reaches 1000: the loss of an action may fall by more than exp can take."""
    agent = replace(AGENTS["fpo"], weight="elbo", ratio="sum")
    state = start(agent, jr.key(0))
    batch = samples(state, acted(agent, state, jr.key(1)))
    fallen = eqx.tree_at(lambda b: b.extras.loss, batch, batch.extras.loss + 1e4)
    surrogate = eqx.filter_jit(eqx.filter_value_and_grad(agent._surrogate, has_aux=True))
    (loss, metrics), grad = surrogate(state.actor, fallen, jr.key(2))
    assert metrics["clip_share"] > 0.9
    assert np.isfinite(loss) and all(np.isfinite(x).all() for x in jax.tree.leaves(grad))


@partial(jax.jit, static_argnums=0)
def pulled(agent, actor, batch):
    """The loss and the gradient of an agent's surrogate, as one vector."""
    loss, grad = jax.value_and_grad(lambda a: agent._surrogate(a, batch, jr.key(0))[0])(actor)
    return jnp.concatenate([loss[None], *(jnp.ravel(x) for x in jax.tree.leaves(grad))])


def moved(agent):
    """(an actor that has moved since it acted, what it did): ratios of about 1 +- .2."""
    state = start(agent, jr.key(0))
    batch = samples(state, acted(agent, state, jr.key(1)))
    return jax.tree.map(lambda w: w + 0.02 * jr.normal(jr.key(5), w.shape), state.actor), batch


PLUS = AGENTS["fpo++"]


def test_fpo_plus_plus_with_one_pair_and_gains_is_fpo():
    """One pair has one ratio, and ASPO is PPO's clip where no advantage is negative."""
    plus = replace(PLUS, pairs=1, cap=None)
    actor, batch = moved(plus)
    batch = replace(batch, advantage=jnp.abs(batch.advantage))
    ratio = jnp.exp(batch.extras.loss - jax.vmap(actor.losses)(batch.obs, *astuple(batch.extras)[:3]))
    assert 0.1 < jnp.mean(jnp.abs(ratio - 1) > plus.clip) < 0.9, "some are clipped, some are not"
    wanted = pulled(FPO(FLOW, 1, "velocity", "sum", ppo=PASSES), actor, batch)
    np.testing.assert_allclose(pulled(plus, actor, batch), wanted, rtol=1e-4, atol=1e-6 * float(jnp.abs(wanted).max()))


def test_the_first_gradient_of_fpo_plus_plus_is_that_of_fpo():
    """Where all ratios are 1, neither pairs of their own nor ASPO change the gradient (2602.02481, below eq. 10)."""
    state = start(PLUS, jr.key(0))
    batch = samples(state, acted(PLUS, state, jr.key(1)))
    assert (batch.advantage < 0).any()
    plain = pulled(replace(PLUS, per_pair=False, trust="clip"), state.actor, batch)[1:]
    np.testing.assert_allclose(
        pulled(PLUS, state.actor, batch)[1:], plain, rtol=1e-3, atol=1e-5 * float(jnp.abs(plain).max())
    )


def test_aspo_pulls_back_what_became_too_unlikely():
    """d/d rho is |A| (1 + (rho - 1) / clip) for A < 0: zero at 1 - clip, where PPO's clip leaves no gradient below."""
    log_ratio, clip = jnp.log(jnp.array([0.4, 0.7, 0.8, 0.9, 1.0, 1.5])), 0.2
    ratio = np.exp(np.asarray(log_ratio))
    slope = lambda surrogate, a: np.asarray(jax.grad(lambda x: surrogate(x, jnp.full(6, a), clip).sum())(log_ratio))
    np.testing.assert_allclose(slope(aspo, -3.0), 3 * ratio * (1 + (ratio - 1) / clip), rtol=1e-5, atol=1e-6)
    assert (slope(aspo, -3.0)[:2] < 0).all() and (slope(clipped, -3.0)[:2] == 0).all()
    np.testing.assert_array_equal(slope(aspo, 2.0), slope(clipped, 2.0))
    np.testing.assert_allclose(aspo(log_ratio, jnp.full(6, -3.0), 1e6), 3 * ratio, rtol=1e-5)  # no trust region


def test_each_pair_has_a_trust_region_of_its_own():
    """Two pairs of one action, of which one went too far: the other has all of the gradient, half as much."""
    plus = replace(PLUS, pairs=2, trust="clip", cap=None)
    state = start(plus, jr.key(0))
    batch = samples(state, acted(plus, state, jr.key(1)))
    batch = replace(batch, advantage=jnp.ones_like(batch.advantage))
    draw = batch.extras
    far = eqx.tree_at(lambda b: b.extras.loss, batch, draw.loss.at[:, 0].add(0.5))
    alone = replace(batch, extras=Draw(draw.end, draw.t[:, 1:], draw.noise[:, 1:], draw.loss[:, 1:]))
    got, half = pulled(plus, state.actor, far)[1:], 0.5 * pulled(replace(plus, pairs=1), state.actor, alone)[1:]
    np.testing.assert_allclose(got, half, rtol=1e-3, atol=1e-5 * float(jnp.abs(half).max()))
    assert jnp.abs(half).max() > 1e-3
    assert jnp.abs(pulled(replace(plus, per_pair=False), state.actor, far)[1:]).max() == 0, "the mean went too far"


def test_a_pair_beyond_the_cap_is_left_alone():
    """|v - (a - e)|^2 of two coordinates is held to 2 cap, without a gradient."""
    actor = start(replace(PLUS, cap=5.0), jr.key(0)).actor
    t, noise = jnp.array([0.5, 0.5]), jnp.array([[9.0, 9.0], [0.1, 0.2]])
    losses = lambda a: a.losses(jnp.ones(3), jnp.zeros(2), t, noise)
    grads = jax.jit(jax.jacrev(losses))(actor)
    size = sum(jnp.abs(x.reshape(2, -1)).sum(1) for x in jax.tree.leaves(grads))
    np.testing.assert_allclose(losses(actor)[0], 10.0, rtol=1e-6)
    assert size[0] == 0 and size[1] > 0 and losses(actor)[1] < 1


def test_zero_start_is_the_flow_from_zero_in_evaluation_alone():
    state = start(replace(PLUS, zero_start=True), jr.key(0))
    policy, obs = state.actor, jnp.ones(3)
    wanted = policy.flow.action(policy.flow.sample(jnp.zeros(2), obs))
    np.testing.assert_allclose(policy(obs, jr.key(1)), wanted, rtol=1e-5, atol=1e-6)
    assert jnp.abs(policy(obs, jr.key(1), greedy=False) - policy(obs, jr.key(2), greedy=False)).max() > 1e-2


def test_more_minibatches_than_rows_are_refused():
    """They would hold nothing, and their mean would be NaN."""
    agent = replace(AGENTS["ppo"], ppo=replace(AGENTS["ppo"].ppo, minibatches=25))
    state = start(AGENTS["ppo"], jr.key(0))
    with pytest.raises(UserError, match="rollout of 24 rows cannot be cut into 25 minibatches"):
        jax.eval_shape(lambda s, r: agent.update(s, r, jr.key(0)), state, acted(agent, state, jr.key(1)))


@dataclass(frozen=True)
class Counted:
    count: int


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: ReinFlow(steps=0), "steps must be positive"),
        (lambda: check_positive(Counted(2.5), "count"), "count must be a whole number, got 2.5"),
        (lambda: ReinFlow(std_end=-1.0), "std_end in"),
        (lambda: ReinFlow(anchor=-1.0), "anchor >= 0"),
        (lambda: FPO(pairs=0), "pairs must be positive"),
        (lambda: FPO(flow=replace(FlowSpec(), network=ResidualMLP(depth=0))), "depth must be positive"),
        (lambda: PPOSettings(target_kl=0.0), "target_kl must be positive"),
        (lambda: PPOSettings(minibatches=0), "minibatches must be positive"),
        (lambda: PPO(clip=float("nan")), "clip must be positive"),
    ],
)
def test_only_what_can_be_is_accepted(wrong, words: str):
    with pytest.raises(ValueError, match=words):
        wrong()
