"""The one order in which an observation of several parts becomes a vector, in environments and in data alike."""

from typing import Any


def ordered_leaves(obs: Any) -> list[Any]:
    """The arrays in a nested observation, depth first: entries of a dict by their key as a string ("10" before "2"),
    those of a tuple or list in their own order."""
    if isinstance(obs, dict):
        return [leaf for key in sorted(obs, key=str) for leaf in ordered_leaves(obs[key])]
    if isinstance(obs, tuple | list):
        return [leaf for part in obs for leaf in ordered_leaves(part)]
    return [obs]
