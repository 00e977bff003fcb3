"""Code outside the library that may be imported: `--trust my_agent,my_env`, a list of module names.

A config.json, a policy folder or an environment id may name any module, and importing it runs its code. Only modules
that the user named, and everything below them, are imported. All others are refused.
"""

import os
import sys

from contraflow.core.errors import UserError

Trust = str
"""Module names separated by commas; `all` allows any module, the empty string none."""


def admit(path: str, trust: Trust) -> None:
    """Allows `path`, `module:name`, to be imported from the installed packages or else from the working folder.

    The working folder goes to the end of the search path, so a file in it never replaces an installed module. Raises
    UserError, naming the remedy, for a module that `trust` does not name.
    """
    module = path.partition(":")[0]
    named = [name.strip() for name in trust.split(",")]
    if not any(name == "all" or f"{module}.".startswith(f"{name}.") for name in named if name):
        also = ",".join(filter(None, [*named, module]))
        raise UserError(f"{path} is code outside the library; if you trust it, pass --trust {also}")
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())
