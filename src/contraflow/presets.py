"""Named runs: `contraflow train NAME`; the agents behind them are in `contraflow.agents`."""

from contraflow.agents import presets
from contraflow.train.offline import OfflineRun
from contraflow.train.onpolicy import OnPolicyRun
from contraflow.train.run import AnyRun, Run

KINDS = {"replay": Run, "rollout": OnPolicyRun, "dataset": OfflineRun}
PRESETS: dict[str, AnyRun] = {
    name: KINDS[preset.needs](agent=preset.agent, **preset.run) for name, preset in presets().items()
}
