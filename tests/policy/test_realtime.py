"""Resumed chunks against closed forms: the conditional of a Gaussian chunk, and the policy where none is."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from contraflow.agents.offline.bc import BC
from contraflow.core.optim import Optim
from contraflow.core.types import Batch, EnvSpec, UserError
from contraflow.flow.coupling import Weighted
from contraflow.flow.fewstep import MeanFlow
from contraflow.flow.model import Ddim, Flow, FlowSpec
from contraflow.flow.path import VP
from contraflow.flow.solver import EulerMaruyama
from contraflow.flow.support import Real, Tanh
from contraflow.nets.critic import QEnsemble
from contraflow.nets.transformer import ChunkTransformer
from contraflow.nets.velocity import ResidualMLP
from contraflow.policy.artifact import load_policy, save_policy
from contraflow.policy.base import Cost, inner
from contraflow.policy.best_of import Argmax, BestOf, First
from contraflow.policy.flow import FlowPolicy
from contraflow.policy.guided import guided
from contraflow.policy.normalise import Normalised, RunningMoments
from contraflow.policy.realtime import Guidance, Prefix, RealTime, _Given, _pulled, overlap_weights, realtime
from contraflow.policy.uniform import uniform_policy
from contraflow.policy.value import Judge

H, A = 6, 2
OBS = jnp.array([0.5, -1.0, 2.0])
STATS = RunningMoments(jnp.array([1.0, 0.0, 2.0]), jnp.array([4.0, 1.0, 0.25]), jnp.asarray(10.0))
NETWORKS = [ResidualMLP(16, 1, 8), ChunkTransformer(16, 1, 8)]
BEFORE = jr.uniform(jr.key(9), (H, A), minval=-1.0)


def flow_of(network, key=0, solver=Ddim(4)):
    """A flow whose last layer is not zero, so that it depends on everything."""
    flow = FlowSpec(solver=solver, network=network).init(jr.key(key), H * A, 3, horizon=H)
    leaves, tree = jax.tree.flatten(flow)
    noisy = [x + 0.05 * jr.normal(k, x.shape) for x, k in zip(leaves, jr.split(jr.key(5), len(leaves)), strict=True)]
    return jax.tree.unflatten(tree, noisy)


def wrapped(flow):
    critic = QEnsemble(2, 3, H * A, 8, 1, key=jr.key(1))
    return Normalised(STATS, BestOf(FlowPolicy(flow), critic, jnp.ones(()), First(), Argmax(5)))


def resumed(policy, left, delay, n=8, greedy=True):
    fn = jax.jit(jax.vmap(lambda k: policy.resume(OBS, BEFORE, left, delay, k, greedy)))
    return fn(jr.split(jr.key(3), n))


@pytest.mark.parametrize("network", NETWORKS, ids=["mlp", "transformer"])
@pytest.mark.parametrize("greedy", [True, False])
def test_without_a_previous_chunk_it_is_the_policy(network, greedy):
    """Bit for bit. Of a transformer with a gradient, or a time for each action, float32 rounds otherwise."""
    policy = wrapped(flow_of(network))
    plain = jax.jit(jax.vmap(lambda k: policy(OBS, k, greedy)))(jr.split(jr.key(3), 8)).reshape(8, H, A)
    ours = realtime(policy)
    rounding = 0.0 if isinstance(network, ResidualMLP) else 1e-5
    np.testing.assert_allclose(plain, resumed(ours, 0, 0, greedy=greedy), rtol=0, atol=rounding)
    np.testing.assert_allclose(plain, resumed(ours, 0, 3, greedy=greedy), rtol=0, atol=rounding)
    trained = resumed(RealTime(policy, Prefix(3)), H, 0, greedy=greedy)
    np.testing.assert_allclose(plain, trained, rtol=0, atol=rounding)
    np.testing.assert_array_equal(ours(OBS, jr.key(1), greedy), policy(OBS, jr.key(1), greedy))
    assert np.abs(plain - resumed(ours, 4, 2, greedy=greedy)).max() > 1e-2


@pytest.mark.parametrize("network", NETWORKS, ids=["mlp", "transformer"])
@pytest.mark.parametrize(
    "rule", [Guidance(), Guidance(jacobian=False), Prefix(3)], ids=["guided", "identity", "trained"]
)
def test_the_chunk_begins_with_what_is_executed_meanwhile(network, rule):
    """Bit for bit, as many actions as the delay says and the previous chunk holds, in every wrapper."""
    inside = guided(wrapped(flow_of(network)), 0.3, _critic())
    for policy in (FlowPolicy(flow_of(network)), wrapped(flow_of(network)), inside):
        for left, delay in ((5, 3), (2, 3), (5, 0)):
            chunks, known = resumed(RealTime(policy, rule), left, delay), min(left, delay)
            np.testing.assert_array_equal(chunks[:, :known], jnp.broadcast_to(BEFORE[:known], (8, known, A)))
            assert np.abs(chunks[:, known:] - BEFORE[None, known:]).min(0).max() > 1e-3
            assert np.ptp(chunks[:, known:], axis=0).max() > 0


def _critic():
    return Judge(QEnsemble(2, 3, H * A, 8, 1, key=jr.key(2)), STATS)


def test_weights_of_the_overlap():
    """1 for what is given, then falling to 0 where the previous chunk ends."""
    np.testing.assert_allclose(overlap_weights("linear", 10, 2, 6), [1, 1, 0.8, 0.6, 0.4, 0.2, 0, 0, 0, 0], atol=1e-6)
    np.testing.assert_array_equal(overlap_weights("none", 5, 2, 4), [1, 1, 0, 0, 0])
    c = np.array([0.8, 0.6, 0.4, 0.2])
    np.testing.assert_allclose(overlap_weights("exp", 10, 2, 6)[2:6], c * (np.exp(c) - 1) / (np.e - 1), rtol=1e-5)
    for soft in ("exp", "linear", "none"):
        np.testing.assert_array_equal(overlap_weights(soft, 4, 3, 0), np.zeros(4))
        assert overlap_weights(soft, 4, 3, 2)[2] == 0


class Gaussian(eqx.Module):
    """The exact velocity of chunks ~ N(0, C), whatever the time of each action."""

    cov: jnp.ndarray

    @property
    def dim(self):
        return len(self.cov)

    def __call__(self, x, t, cond):
        t = jnp.broadcast_to(t / 5.0, x.shape)  # the clock of the flow
        noisy = t[:, None] * self.cov * t[None] + jnp.diag((1 - t) ** 2 + 1e-6)
        end = self.cov @ (t * jnp.linalg.solve(noisy, x))
        return (end - x) / jnp.maximum(1 - t, 1e-3)


COV = 0.3**2 * 0.9 ** np.abs(np.arange(H)[:, None] - np.arange(H)[None])
GOAL, KNOWN = jnp.array([0.3, 0.36, 0.0, 0.0, 0.0, 0.0]), np.arange(H) < 2


def conditional(cov):
    """Mean and covariance of the rest of a chunk, given its first two actions."""
    slope = cov[2:, :2] @ np.linalg.inv(cov[:2, :2])
    return slope @ np.asarray(GOAL[:2]), cov[2:, 2:] - slope @ cov[:2, 2:]


def ends(net, spec):
    """Mean and covariance of the end of an affine flow from N(0, I)."""
    flow = Flow(net, replace(spec, clock=1.0))
    sample = jax.jit(lambda x0: flow.sample(x0, jnp.zeros(1)))
    slope = jax.jacobian(sample)(jnp.zeros(H))
    return np.asarray(sample(jnp.zeros(H))), np.asarray(slope @ slope.T)


def test_a_given_prefix_leads_to_the_conditional_gaussian():
    """The mean is exact, and the error of the spread falls as one over the number of steps, as for any flow."""
    mean, cov = conditional(COV)
    gaps = []
    for steps in (20, 80, 320):
        spec = FlowSpec(solver=Ddim(steps), support=Real())
        got, spread = ends(_Given(Flow(Gaussian(jnp.asarray(COV)), spec), GOAL, jnp.asarray(KNOWN)), spec)
        np.testing.assert_allclose(got[:2], GOAL[:2], atol=1e-6)
        np.testing.assert_allclose(got[2:], mean, atol=1e-3)
        gaps.append(np.abs(np.sqrt(np.diag(spread)[2:]) - np.sqrt(np.diag(cov))).max())
    assert gaps[2] < 0.003 and 3 < gaps[0] / gaps[1] < 5 and 3 < gaps[1] / gaps[2] < 5


def pulled(cov, rule, steps):
    spec = FlowSpec(solver=Ddim(steps), support=Real())
    flow = Flow(Gaussian(jnp.asarray(cov)), spec)
    return ends(_pulled(flow, GOAL, jnp.asarray(KNOWN, jnp.float32), rule), spec)


def test_guidance_is_exact_for_independent_actions_of_its_deviation():
    """The actions that are known land on the previous ones, and the others stay as they are."""
    for std in (1.0, 0.3):
        rule = Guidance(1e9, std, "none")
        got, spread = pulled(std**2 * np.eye(H), rule, 200)
        np.testing.assert_allclose(got, GOAL, atol=1e-3)
        np.testing.assert_allclose(np.sqrt(np.diag(spread))[2:], std, rtol=0.02)
        assert np.sqrt(np.diag(spread))[:2].max() < 0.01
    # With as many steps as the limit says, the last step lands on the goal even so (1 step of Newton).
    for n in (5, 10):
        np.testing.assert_allclose(pulled(np.eye(H), Guidance(float(n), 1.0, "none"), n)[0], GOAL, atol=0.01)


def test_how_far_guidance_is_from_the_conditional_gaussian():
    """Neighbours with correlation .9 and deviation .3: the rest follows by 85 to 90 % with a `std` that is right, by
    half with 1, and less and less along the chunk where the Jacobian is left out."""
    mean, _ = conditional(COV)

    def share(rule):
        return pulled(COV, rule, 10)[0][2:] / mean

    assert (np.abs(share(Guidance(10.0, 0.3, "none")) - 0.88) < 0.05).all()
    assert (np.abs(share(Guidance(10.0, 1.0, "none")) - 0.45) < 0.12).all()
    identity = share(Guidance(10.0, 0.3, "none", jacobian=False))
    assert identity[0] > 1.0 > 0.85 > identity[-1]


def trained(network, delay_max=3, steps=1500):
    """BC on Gaussian chunks."""
    agent = BC(FlowSpec(solver=Ddim(30), network=network), delay_max=delay_max, optim=Optim(2e-3), ema=0.99)
    state = agent.init(jr.key(0), EnvSpec(1, H, 1, None, False, H, 3))
    root = jnp.linalg.cholesky(jnp.asarray(COV, jnp.float32))

    @jax.jit
    def train(state, key):
        def step(state, key):
            k_data, k_update = jr.split(key)
            x = jr.normal(k_data, (256, H)) @ root.T
            zero = jnp.zeros((256, 1))
            return agent.update(state, Batch(zero, x, zero[:, 0], zero[:, 0], zero, jnp.ones_like(x)), k_update)[
                0
            ], None

        return jax.lax.scan(step, state, jr.split(key, steps))[0]

    return agent.policy(train(state, jr.key(1)))


@pytest.mark.slow
@pytest.mark.parametrize("network", [ResidualMLP(64, 2, 16), ChunkTransformer(32, 2, 16)], ids=["mlp", "transformer"])
def test_a_flow_that_was_trained_for_it_resumes_gaussian_chunks(network):
    """The rest has nearly the mean and spread of the conditional; a perceptron takes longer to learn both cases."""
    policy = trained(network)
    mean, cov = conditional(COV)

    @jax.jit
    @jax.vmap
    def rest(key):
        return policy.resume(jnp.zeros(1), GOAL[:, None], H, 2, key)[2:, 0]

    got = rest(jr.split(jr.key(2), 2000))
    np.testing.assert_allclose(got.mean(0), mean, atol=0.04 if isinstance(network, ChunkTransformer) else 0.08)
    np.testing.assert_allclose(got.std(0), np.sqrt(np.diag(cov)), rtol=0.25)


def test_it_is_saved_as_any_policy(tmp_path):
    agent = BC(FlowSpec(solver=Ddim(3), network=ResidualMLP(8, 1, 4)), delay_max=2)
    policy = agent.policy(agent.init(jr.key(0), EnvSpec(3, H * A, 1, None, False, H, 3)))
    assert isinstance(policy, RealTime) and policy.rule == Prefix(2)
    for one in (policy, realtime(policy)):
        save_policy(tmp_path, one, EnvSpec(3, H * A, 1, None, False, H, 3), "probe:action")
        loaded = load_policy(tmp_path)[0]
        np.testing.assert_array_equal(resumed(one, 4, 2), resumed(loaded, 4, 2))
    assert realtime(policy).policy is policy.policy and inner(policy, "cost") == Cost(1, 3, 0)


def test_bad_use():
    flow = flow_of(ResidualMLP(8, 1, 4))
    for spec in (FlowSpec(path=VP()), FlowSpec(averaged=True), FlowSpec(solver=EulerMaruyama(4)), FlowSpec(clip=1.0)):
        with pytest.raises(UserError, match="linear path"):
            realtime(FlowPolicy(replace(flow, spec=spec)))
    realtime(FlowPolicy(replace(flow, spec=FlowSpec(support=Tanh()))))
    with pytest.raises(UserError, match="flow policy"):
        realtime(uniform_policy(2))
    for bad in ({}, {"objective": MeanFlow()}, {"coupling": Weighted()}, {"flow": FlowSpec(clip=1.0)}):
        with pytest.raises(ValueError, match="delay_max"):
            BC(**({"delay_max": 1} | bad) if bad else {"delay_max": -1})
    with pytest.raises(UserError, match="leaves nothing"):
        BC(delay_max=2).init(jr.key(0), EnvSpec(3, 2, 1, None, False, 2, 2))
    for bad in ({"limit": 0.0}, {"std": -1.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Guidance(**bad)
    with pytest.raises(ValueError, match="delay_max"):
        Prefix(-1)
