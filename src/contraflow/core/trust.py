"""Which code outside the library may be imported: `--trust my_agent,my_env`, the names of modules.

A config.json, a policy folder or an environment id may name any module, and importing it runs it. What the user named
is imported, with all that lies below it; the rest is refused."""

import os
import sys

from contraflow.core.errors import UserError

Trust = str
"""Names of modules, separated by commas; `all` is any, the empty string none."""


def admit(path: str, trust: Trust) -> None:
    """Allow `path`, `module:name`, to be imported: from the installed packages or else from the working folder.

    The working folder goes to the end of the path, so that a file in it never takes the place of an installed module.
    Raises UserError, naming the remedy, for a module that `trust` does not name.
    """
    module = path.partition(":")[0]
    named = [name.strip() for name in trust.split(",")]
    if not any(name == "all" or f"{module}.".startswith(f"{name}.") for name in named if name):
        also = ",".join(filter(None, [*named, module]))
        raise UserError(f"{path} is code outside the library; if you trust it, pass --trust {also}")
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())
