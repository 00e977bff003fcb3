"""Names of OGBench: the name of a task contains the kind of its dataset, the id in Gymnasium does not."""

PREFIX = "ogbench:"
KINDS = ("play", "noisy", "navigate", "stitch", "explore")


def single_task(name: str) -> str | None:
    """Returns the id in Gymnasium of a single task, `cube-single-singletask-task1-v0` for
    `ogbench:cube-single-play-singletask-task1-v0`; None for other names."""
    words = name.removeprefix(PREFIX).split("-")
    if "singletask" not in words[1:]:
        return None
    at = words.index("singletask")
    return "-".join(words[: at - 1] + words[at:] if words[at - 1] in KINDS else words)
