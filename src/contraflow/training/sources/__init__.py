"""Where the experience of a run comes from; one file each."""

from contraflow.training.sources.conditions import Conditions
from contraflow.training.sources.dataset import Dataset
from contraflow.training.sources.offline_to_online import OfflineToOnline
from contraflow.training.sources.replay import Replay
from contraflow.training.sources.rollouts import Rollouts

Source = Replay | Rollouts | Dataset | OfflineToOnline | Conditions
BY_NEED: dict[str, type[Source]] = {"replay": Replay, "rollout": Rollouts, "dataset": Dataset, "conditions": Conditions}
"""The source of an agent that says what it needs."""

__all__ = ["BY_NEED", "Conditions", "Dataset", "OfflineToOnline", "Replay", "Rollouts", "Source"]
