"""The agents, a file each. A new one adds its line here; a script may pass its own to `train` without that."""

from functools import cache
from importlib import import_module
from typing import Any

from contraflow.agents.base import Preset
from contraflow.core.types import UserError

MODULES = (
    "online.rfm",
    "online.maxentdp",
    "online.sdac",
    "online.dqs",
    "online.qsm",
    "online.flame",
    "online.mfpo",
    "online.pmd",
    "online.dpmd",
    "online.fpmd",
    "online.qvpo",
    "online.dacer",
    "online.sac",
    "online.td3",
    "online.sir",
    "online.dsrl",
    "online.residual",
    "onpolicy.ppo",
    "onpolicy.reinflow",
    "onpolicy.dppo",
    "onpolicy.fpo",
    "onpolicy.flow_ppo",
    "offline.bc",
    "offline.fql",
    "offline.iql",
    "offline.ifql",
    "offline.idql",
    "offline.qc",
    "offline.rebrac",
    "offline.qam",
    "offline.expo",
    "offline.dql",
    "offline.dac",
    "offline.rql",
    "align.flow_grpo",
    "align.mix_grpo",
    "align.temp_flow_grpo",
    "align.grpo_guard",
    "align.tree_rpo",
    "align.flow_dppo",
    "align.ddrl",
    "align.flow_grpo_one",
    "align.nft",
    "align.awm",
    "align.rwr",
    "align.ac_flow",
    "align.flow_dpo",
    "align.adjoint_matching",
    "align.rfm_align",
)


@cache
def presets() -> dict[str, Preset]:
    """All presets by name, in the order of the files."""
    found = [preset for name in MODULES for preset in import_module(f"contraflow.agents.{name}").PRESETS]
    return {preset.name: preset for preset in found}


@cache
def classes() -> dict[str, type[Any]]:
    """The classes of agents by name: what the field `agent` of a file of settings may name."""
    return {type(preset.agent).__name__: type(preset.agent) for preset in presets().values()}


def needs(agent: Any) -> str:
    """What an agent learns from: "replay", "rollout", "dataset" or "conditions".

    A user-defined agent says it in `needs`, or is off-policy.

    Raises UserError for a word that is none of these.
    """
    found = getattr(agent, "needs", None) or next(
        (preset.needs for preset in presets().values() if type(preset.agent) is type(agent)), "replay"
    )
    if found not in ("replay", "rollout", "dataset", "conditions"):
        raise UserError(
            f"{type(agent).__name__}.needs is {found!r}: say 'replay', 'rollout', 'dataset' or 'conditions'"
        )
    return found
