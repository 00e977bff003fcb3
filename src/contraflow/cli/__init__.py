"""The command line: `python -m contraflow` and the console script `contraflow` both call `main`."""

import os
import sys

from contraflow.core.types import UserError

USAGE = """\
usage: contraflow COMMAND ...

Flow policies for reinforcement learning, in JAX.

commands:
  train PRESET    train an agent: contraflow train rfm --env envpool:CartpoleSwingup-v1
  resume DIR      continue a run that was interrupted, or extend it with --steps
  eval DIR        returns of a trained policy, and a video with --video out.mp4
  compare         train a matrix of agents, environments and seeds, or continue one
  report DIR      one page over the runs in DIR: scores with intervals, curves, diagnostics
  record POLICY   roll a policy out and write the episodes as a dataset
  data info SET   sizes, returns and ranges of a dataset, and problems found in it
  sample TARGET   train a flow to an unnormalised density, without reinforcement learning
  list KIND       what there is: agents, envs or presets; with a pattern, those that match

options:
  -h, --help      this text; `contraflow COMMAND --help` explains a command
  --version       version of contraflow

`contraflow train PRESET --help` lists every setting of a preset. Errors end with exit code 2."""

COMMANDS = ("train", "resume", "eval", "compare", "report", "record", "data", "sample", "list")


def main(args: list[str] | None = None) -> int:
    """Run one command; the exit code: 0, 1 (`--require` missed, cells failed), 2 (the user's mistake), 130 (Ctrl-C)."""
    args = sys.argv[1:] if args is None else list(args)
    try:
        return _dispatch(args)
    except UserError as error:
        print(f"contraflow: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("contraflow: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `contraflow list envs | head`
        sys.stderr.close()
        return 0


def _dispatch(args: list[str]) -> int:
    from contraflow import __version__
    from contraflow.core.settings import suggest

    command, *rest = args or ["--help"]
    if "--trust" in rest and not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())  # as `python -m` has it and an installed script has not
    if command in ("-h", "--help"):
        print(USAGE)
    elif command == "--version":
        print(f"contraflow {__version__}")
    elif command == "train":
        from contraflow.cli.train import train_command

        return train_command(rest)
    elif command == "resume":
        from contraflow.cli.train import resume_command

        return resume_command(rest)
    elif command == "eval":
        from contraflow.cli.evaluate import eval_command

        return eval_command(rest)
    elif command == "compare":
        from contraflow.cli.compare import compare_command

        return compare_command(rest)
    elif command == "report":
        from contraflow.cli.report import report_command

        return report_command(rest)
    elif command == "record":
        from contraflow.cli.data import record_command

        return record_command(rest)
    elif command == "data":
        from contraflow.cli.data import data_command

        return data_command(rest)
    elif command == "list":
        from contraflow.cli.listing import list_command

        return list_command(rest)
    elif command == "sample":
        from contraflow.cli.sample import sample_command

        return sample_command(rest)
    else:
        raise UserError(f"there is no command {command}; {suggest(command, COMMANDS)}")
    return 0
