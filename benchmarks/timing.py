"""Paired timing: two or more callables in turn, many rounds, medians and ratios. The machine's noise hits all alike."""

import statistics
import time
from collections.abc import Callable, Mapping

import jax


def paired(
    cases: Mapping[str, Callable[[], object]], rounds: int = 15, inner: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:  # fmt: skip
    """Seconds per call of every case, one entry per round; each case is run once first, to compile."""
    for call in cases.values():
        jax.block_until_ready(call())
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, call in cases.items():
            start = clock()
            jax.block_until_ready([call() for _ in range(inner)])
            times[name].append((clock() - start) / inner)
    return times


def report(times: dict[str, list[float]], against: str, unit: str = "ms") -> list[tuple[str, float, float]]:
    """Print and return (name, median in `unit`, median of the paired ratios to the case `against`)."""
    scale = {"s": 1.0, "ms": 1e3, "us": 1e6}[unit]
    rows = []
    for name, values in times.items():
        ratio = statistics.median(a / b for a, b in zip(values, times[against], strict=True))
        rows.append((name, statistics.median(values) * scale, ratio))
        print(f"{name:44s} {rows[-1][1]:10.3f} {unit}   x {ratio:.3f} of {against}", flush=True)
    return rows
