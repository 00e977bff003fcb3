"""The command line: `python -m contraflow` and the console script `contraflow` both call `main`.

Nothing heavy is imported before a command is chosen.
"""

import importlib
import sys

from contraflow.core import interrupt
from contraflow.core.errors import IN_CALLBACK, UserError
from contraflow.core.settings import suggest, version

USAGE = """\
usage: contraflow COMMAND ...

Flow policies for reinforcement learning, in JAX.

commands:
  train PRESET    train an agent: contraflow train rfm --env envpool:CartpoleSwingup-v1
  align METHOD    align a flow with rewards, after `align pretrain PROBLEM`
  resume DIR      continue a run that was interrupted, or extend it with --steps
  eval DIR        returns of a trained policy, and a video with --video out.mp4
  compose DIRS    weights with which several policies act as one, found by evaluation
  compare         train a matrix of agents, environments and seeds, or continue one
  report DIR      one page over the runs in DIR: scores with intervals, curves, diagnostics
  record POLICY   roll a policy out and write the episodes as a dataset
  monitor DIR     learn what a policy's good episodes look like, to raise alarms later
  data info SET   sizes, returns and ranges of a dataset, and problems found in it
  data make SET   make a dataset of a benchmark here, such as ogbench:cube-single-play
  serve DIR       answer robots and benchmarks with the actions of a trained policy
  export DIR      a trained policy as one file, for ONNX Runtime or JAX alone
  push DIR NAME   share a trained policy with a model card, on the hub or as a folder
  pull NAME       fetch a shared policy
  sample TARGET   train a flow to an unnormalised density, without reinforcement learning
  list KIND       what there is: agents, envs or presets; with a pattern, those that match

options:
  -h, --help      this text; `contraflow COMMAND --help` explains a command
  --version       version of contraflow

`contraflow train PRESET --help` lists the settings that are changed most, `--help-all` all.
Errors end with exit code 2."""

COMMANDS = {
    "train": "contraflow.cli.train:train_command",
    "align": "contraflow.cli.align:align_command",
    "resume": "contraflow.cli.train:resume_command",
    "eval": "contraflow.cli.evaluate:eval_command",
    "compose": "contraflow.cli.compose:compose_command",
    "compare": "contraflow.cli.compare:compare_command",
    "report": "contraflow.cli.report:report_command",
    "record": "contraflow.cli.data:record_command",
    "data": "contraflow.cli.data:data_command",
    "monitor": "contraflow.cli.monitor:monitor_command",
    "serve": "contraflow.cli.serve:serve_command",
    "export": "contraflow.cli.export:export_command",
    "push": "contraflow.cli.hub:push_command",
    "pull": "contraflow.cli.hub:pull_command",
    "sample": "contraflow.cli.sample:sample_command",
    "list": "contraflow.cli.listing:list_command",
}
"""What each command calls with the arguments after it; None as the exit code is 0."""
OWN_SIGNALS = ("compare", "serve")
"""Commands that look after other processes or clients, and wait for these when they are interrupted."""


def main(args: list[str] | None = None) -> int:
    """Run one command; the exit code: 0, 1 (`--require` missed, cells failed), 2 (the user's mistake), 130 (Ctrl-C)."""
    args = sys.argv[1:] if args is None else list(args)
    try:
        with interrupt.guard() as guard:
            return _dispatch(args, guard)
    except UserError as error:
        return _refuse(error)
    except KeyboardInterrupt:
        print("contraflow: interrupted", file=sys.stderr)
        return interrupt.INTERRUPTED
    except BrokenPipeError:  # `contraflow list envs | head`
        sys.stderr.close()
        return 0
    except Exception as error:
        if not (causes := [cause for cause in IN_CALLBACK if str(cause) in str(error)]):
            raise
        return _refuse(causes[0])


def _refuse(error: UserError) -> int:
    print(f"contraflow: error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def _dispatch(args: list[str], guard: interrupt.Guard | None) -> int:
    command, *rest = args or ["--help"]
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    if command == "--version":
        print(f"contraflow {version()}")
        return 0
    if command not in COMMANDS:
        raise UserError(f"there is no command {command}; {suggest(command, COMMANDS)}")
    module, _, name = COMMANDS[command].partition(":")
    call = getattr(importlib.import_module(module), name)
    if guard and command in OWN_SIGNALS:
        guard.release()
    return call(rest) or 0
