"""The order in which an observation of several parts becomes a vector, in environments and in data."""

from typing import Any


def ordered_leaves(obs: Any) -> list[Any]:
    """Returns the arrays of a nested observation, depth first.

    Entries of a dict are sorted by their key as a string ("10" before "2"); tuples and lists keep their order.
    """
    if isinstance(obs, dict):
        return [leaf for key in sorted(obs, key=str) for leaf in ordered_leaves(obs[key])]
    if isinstance(obs, tuple | list):
        return [leaf for part in obs for leaf in ordered_leaves(part)]
    return [obs]


def leaf_names(obs: Any) -> tuple[str, ...]:
    """Returns the path of each of `ordered_leaves` in a nested observation: "arm/angle", "0"; () for one array."""
    if isinstance(obs, dict):
        parts = [(str(key), obs[key]) for key in sorted(obs, key=str)]
    elif isinstance(obs, tuple | list):
        parts = [(str(i), part) for i, part in enumerate(obs)]
    else:
        return ()
    return tuple(f"{key}/{rest}" if rest else key for key, part in parts for rest in leaf_names(part) or ("",))
