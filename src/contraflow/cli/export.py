"""`contraflow export`: a trained policy as one file for programs without this library."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from contraflow.cli.flags import Modules, read_flags
from contraflow.policy.artifact import policy_folder
from contraflow.policy.noise import UNROLL
from contraflow.runtime.export import CALLS, LIMIT, Format, export
from contraflow.runtime.policy import load


@dataclass(frozen=True)
class Export:
    """Write a trained policy as one file that maps observations and noise to actions, and compare the two."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Folder of a run or of a policy. The file is written beside the weights of the policy."""
    to: Format = "onnx"
    """onnx runs on NumPy and onnxruntime, stablehlo on JAX."""
    unroll: int = UNROLL
    """Unroll loops of at most this many steps: faster to run, and a larger file."""
    trust: Modules = ""
    """Modules outside the library that may be imported, separated by commas; `all` allows any."""

    def __post_init__(self):
        if self.unroll < 0:
            raise ValueError(f"unroll must not be negative, got {self.unroll}")


def export_command(args: list[str]) -> int:
    """Runs `contraflow export FOLDER`; returns the exit code."""
    options = read_flags(Export, args, prog="contraflow export")
    found = export(load(options.folder, 0, options.trust), policy_folder(options.folder), options.to, options.unroll)
    shapes = ", ".join(f"{name} {['B', *shape]}".replace("'", "") for name, shape in found.inputs.items())
    output = f"{['B', *found.output]}".replace("'", "")
    policy, file = (f"{1e6 * seconds:.0f} us" for seconds in (found.policy_seconds, found.file_seconds))
    print(f"written  {found.file}, {found.file.stat().st_size / 1e3:.0f} kB")
    print(f"input    {shapes}")
    print(f"output   action {output}, in the range of the environment")
    print(f"parity   {found.parity:.1e} of half the range of an action over {found.rows} inputs; {LIMIT:g} is allowed")
    print(f"latency  {policy} for the saved policy, {file} for the file: medians of {CALLS} calls with one observation")
    return 0
