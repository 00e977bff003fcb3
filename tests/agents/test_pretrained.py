"""A cloned policy starts every flow agent: it acts as it did, from the same noise, and then learns."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tests.contract.cases import CRITIC, FAST, NET, PASSES, SPEC, Case

from contraflow.agents import presets
from contraflow.agents.base import flow_of
from contraflow.agents.offline.bc import BC
from contraflow.agents.online.dacer import DACER
from contraflow.agents.online.pmd import PMD, Candidates, Selection
from contraflow.agents.online.rfm import RFM, Choice
from contraflow.agents.online.sac import SAC
from contraflow.agents.onpolicy.dppo import DPPO
from contraflow.agents.onpolicy.fpo import FPO
from contraflow.agents.onpolicy.reinflow import ReinFlow
from contraflow.core.types import UserError
from contraflow.flow.fewstep import MeanFlow
from contraflow.flow.kernel import posterior_std
from contraflow.flow.model import Ddim, Flow, FlowSpec
from contraflow.flow.posterior.gibbs import Gibbs
from contraflow.policy.best_of import First, Softmax
from contraflow.policy.flow import FlowPolicy
from contraflow.policy.normalise import RunningMoments
from contraflow.policy.uniform import uniform_policy

FLOW = FlowSpec(solver=Ddim(3), network=NET)  # all agents act by as many steps
STATS = RunningMoments(jnp.array([1.0, -2.0, 0.5]), jnp.array([4.0, 0.25, 1.0]), jnp.asarray(9.0))
LEARNED = {"critic": CRITIC, "optim": FAST}


def particle(key):
    """The key of the noise of one particle of `BestOf`."""
    return jr.split(key)[0]


def after_noise(key):
    """The key of a policy within `Noisy`."""
    return jr.split(key)[0]


ONE = {"explore": First(), "greedy": First()}
AGENTS = {
    "rfm": (RFM(choose=Choice(backup=Softmax(4), **ONE), **LEARNED), particle),
    "pmd": (
        PMD(candidates=Candidates(own=4), choose=Selection(**ONE), **LEARNED),
        lambda key: particle(after_noise(key)),
    ),
    "dacer": (DACER(draws=4, **LEARNED), after_noise),
    "reinflow": (ReinFlow(steps=3, anchor=0.1, ppo=PASSES), lambda key: key),
    "fpo": (FPO(pairs=2, ppo=PASSES), lambda key: key),
    "bc": (BC(optim=FAST), lambda key: key),
}
DENOISER = DPPO(learned=2, ppo=PASSES)


@pytest.fixture(scope="module")
def cloned():
    """A cloned policy with weights of its own and normalised observations."""
    agent = BC(FLOW)
    state = agent.init(jr.key(8), SPEC)
    small = 0.2 * state.average.net.last.weight  # most ends lie within the box
    state = eqx.tree_at(lambda s: s.average.net.last.weight, state, small)
    return agent.policy(replace(state, stats=STATS))


def started(agent, policy):
    """(settings, state) of an agent that begins where `policy` is."""
    agent = agent.starting_from(policy)
    return agent, agent.adopt(agent.init(jr.key(1), SPEC), policy)


def leaves_of(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def same(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(leaves_of(a), leaves_of(b), strict=True))


OBS = 2.0 * jr.normal(jr.key(7), (12, 3)) + STATS.mean[None]


@pytest.mark.parametrize("name", AGENTS)
def test_it_acts_as_the_cloned_policy(name, cloned):
    agent, noise_key = AGENTS[name]
    agent, state = started(agent, cloned)
    policy = agent.policy(state)
    keys = jr.split(jr.key(2), 12)

    @jax.jit
    def both(policy, cloned):
        acts = jax.vmap(lambda o, k: policy(o, k))(OBS, keys)
        x0 = jax.vmap(lambda k: cloned.policy.flow.noise(noise_key(jr.clone(k))))(keys)
        return acts, jax.vmap(lambda o, x: cloned.policy.from_noise(cloned.stats(o), x))(OBS, x0)

    got, want = both(policy, cloned)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert np.mean(np.abs(want) < 1) > 0.4
    assert same(flow_of(policy, agent)[0].net, cloned.policy.flow.net) and same(policy.stats, STATS)
    # Copies, so that a donated state gives nothing of the pretrained policy away.
    assert not {id(leaf) for leaf in jax.tree.leaves(state)} & {id(leaf) for leaf in jax.tree.leaves(cloned)}


def test_dppo_denoises_as_the_cloned_policy(cloned):
    """The chain of DDPM with the ends that the cloned flow predicts: steps that stay, and steps that learn."""
    agent, state = started(DENOISER, cloned)
    policy, flow, path = agent.policy(state), cloned.policy.flow, FLOW.path
    assert (policy.policy.steps, policy.policy.learned) == (3, 2)
    assert same(state.actor.net, flow.net) and same(state.reference.net, flow.net)
    obs, key = OBS[0], jr.key(3)
    k_x0, k_before, k_learned = jr.split(jr.clone(key), 3)
    noise = jnp.concatenate([jr.normal(k_before, (1, 2)), jr.normal(k_learned, (2, 2))])
    x = flow.noise(k_x0)
    for k in range(3):
        t, r = jnp.asarray(k / 3), jnp.asarray((k + 1) / 3)
        x1, x0 = flow.ends(x, t, STATS(obs))
        std = posterior_std(path, t, r)
        x = path.alpha(r) * x1 + jnp.sqrt(path.beta(r) ** 2 - std**2) * x0 + std * noise[k]
    np.testing.assert_allclose(jax.jit(lambda p: p(obs, key))(policy), jnp.clip(x, -1, 1), rtol=1e-5, atol=1e-6)


def test_what_dppo_does_not_learn_stays_as_it_was(cloned):
    """The first steps are those of the pretrained network, wherever the one that learns has moved."""
    agent, state = started(DENOISER, cloned)
    moved = replace(state, actor=jax.tree.map(lambda w: w + 0.3, state.actor))
    sample = jax.jit(lambda state: agent.policy(state).sample(OBS[0], jr.key(3))[1].chain)
    before, after = sample(state), sample(moved)
    np.testing.assert_array_equal(before[0], after[0])
    assert np.abs(before[1:] - after[1:]).min() > 1e-3
    other = replace(state, reference=jax.tree.map(lambda w: w + 0.3, state.reference))
    assert np.abs(sample(other)[0] - before[0]).min() > 1e-3


@pytest.mark.parametrize(
    "name", [n if n in ("rfm", "reinflow") else pytest.param(n, marks=pytest.mark.slow) for n in [*AGENTS, "dppo"]]
)
def test_one_update_moves_it(name, cloned):
    """The flow that acts; not the statistics, which belong to it, nor what is kept as it was pretrained."""
    agent, state = started(DENOISER if name == "dppo" else AGENTS[name][0], cloned)
    case = Case(name, agent)
    before = leaves_of(cloned)
    new, metrics = case.update(state, case.data(state, jr.key(4)), jr.key(5))
    policy = agent.policy(new)
    moved = flow_of(policy, agent)[0].net
    assert not any(
        np.array_equal(a, b) for a, b in zip(leaves_of(moved), leaves_of(cloned.policy.flow.net), strict=True)
    )
    assert all(np.isfinite(x).all() for x in leaves_of((new, metrics)))
    assert same(new.stats, STATS)
    if name in ("reinflow", "dppo"):
        assert same(new.reference.net, cloned.policy.flow.net)
    if name == "pmd":
        assert not same(new.slow.net, cloned.policy.flow.net)
    assert all(np.array_equal(a, b) for a, b in zip(before, leaves_of(cloned), strict=True)), "nothing was given away"


def test_rfm_estimates_in_the_box_of_the_cloned_flow(cloned):
    """Our default is for tanh; in a box its steps stay within the actions. The times of training keep a margin."""
    agent = RFM().starting_from(cloned)
    assert agent.target.estimator == Gibbs(bound=1.0) and agent.flow.margin == RFM().flow.margin
    assert agent.normalise_obs == "frozen"
    assert replace(RFM(), normalise_obs="running").starting_from(cloned).normalise_obs == "running"
    assert ReinFlow().starting_from(cloned).ppo.normalise_obs == "frozen"


def test_what_is_no_flow_is_refused():
    starts = [preset.agent for preset in presets().values() if hasattr(preset.agent, "starting_from")]
    assert {type(agent).__name__ for agent in starts} >= {"RFM", "PMD", "DACER", "ReinFlow", "DPPO", "FPO", "BC"}
    for agent in starts:
        with pytest.raises(UserError, match="contraflow train bc"):
            agent.starting_from(uniform_policy(2))
    assert not hasattr(SAC(), "starting_from")


def test_a_flow_with_other_inputs_is_refused(cloned):
    """Of a network that is told nothing of steps or of a temperature; RFM stops telling what is not heard."""
    with pytest.raises(UserError, match="give PMD the objective Matching"):
        PMD(FLOW, MeanFlow()).starting_from(cloned)
    averages = FlowPolicy(Flow(cloned.policy.flow.net, replace(FLOW, averaged=True)))
    assert BC(objective=MeanFlow()).starting_from(averages).flow.averaged
    with pytest.raises(ValueError, match="an objective that makes steps consistent"):
        RFM().starting_from(averages)
    assert not RFM(condition_on_temperature=True).starting_from(cloned).condition_on_temperature
    told = FlowPolicy(cloned.policy.flow, jnp.ones(()))
    assert RFM().starting_from(told).condition_on_temperature
    with pytest.raises(UserError, match="takes a temperature and PMD has none"):
        PMD().starting_from(told)
