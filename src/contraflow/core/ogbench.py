"""Names of OGBench: what a dataset was recorded by stands in the name of a task, but not in its id in Gymnasium."""

PREFIX = "ogbench:"
KINDS = ("play", "noisy", "navigate", "stitch", "explore")


def single_task(name: str) -> str | None:
    """`cube-single-singletask-task1-v0`, the id in Gymnasium, of `ogbench:cube-single-play-singletask-task1-v0`; None
    where `name` is that of no single task."""
    words = name.removeprefix(PREFIX).split("-")
    if "singletask" not in words[1:]:
        return None
    at = words.index("singletask")
    return "-".join(words[: at - 1] + words[at:] if words[at - 1] in KINDS else words)
