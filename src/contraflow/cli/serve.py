"""`contraflow serve`: a trained policy for robots and benchmarks, over websockets."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from contraflow.cli.flags import Modules, Switch, read_flags
from contraflow.core.bounds import action_range, range_text
from contraflow.core.types import UserError
from contraflow.policy.artifact import revision
from contraflow.policy.realtime import realtime
from contraflow.runtime.policy import Policy, load

if TYPE_CHECKING:
    from contraflow.runtime.serve.desk import Desk

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Serve:
    """Answer observations with actions, for the clients of openpi and vla-eval (docs/how-to/serve.md)."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Folder of a run or of a policy."""
    host: str = "127.0.0.1"
    """Address to listen on; the default is reached from this machine alone, 0.0.0.0 from the network."""
    port: int = 8000
    """Port to listen on; 0 for any free one."""
    key_file: Path | None = None
    """A file with the key that clients must send."""
    batch: int = 8
    """Requests of different clients that are computed together, at most."""
    seed: int = 0
    debug: Annotated[bool, Switch] = False
    """Send clients the traceback of every error."""
    trust: Modules = ""
    """Modules outside the library that may be imported, separated by commas; `all` allows any."""

    def __post_init__(self):
        if self.batch < 1 or not 0 <= self.port < 65536 or not 0 <= self.seed < 2**32:
            raise ValueError("batch must be at least 1, port lie in 0 to 65535, and seed in 0 to 2^32 - 1")


def serve_command(args: list[str]) -> int:
    """Runs `contraflow serve FOLDER` until Ctrl-C; returns the exit code."""
    options = read_flags(Serve, args, prog="contraflow serve")
    try:
        from contraflow.runtime.serve.desk import Desk
        from contraflow.runtime.serve.server import Address, run
    except ModuleNotFoundError as error:
        if error.name not in ("msgpack", "websockets"):
            raise
        raise UserError(f'serving needs {error.name}: pip install "contraflow[serve]"') from None
    key = secret(options.key_file)
    policy = load(options.folder, options.seed, options.trust)
    print("compiling ...", flush=True)
    desk = Desk(resuming(policy), options.batch, options.seed, revision(policy.network), options.debug)
    run(desk, Address(options.host, options.port, key), lambda port: print(greeting(desk, options, port), flush=True))
    print(f"stopped after {desk.metrics.requests} requests")
    return 0


def secret(file: Path | None) -> str:
    """Returns the key in a file, or "". Raises UserError if there is none in it."""
    if file is None:
        return ""
    try:
        key = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the key in {file} cannot be read ({error})") from None
    if not key:
        raise UserError(f"{file} is empty: write the key into it")
    return key


def resuming(policy: Policy) -> Policy:
    """Returns a policy of chunks that can continue the previous one, if its flow allows it; any other as it is."""
    if policy.spec.horizon == 1 or hasattr(policy.network, "resume"):
        return policy
    try:
        return Policy(realtime(policy.network), policy.spec, policy.env, policy.seed)
    except UserError:
        return policy


def greeting(desk: "Desk", options: Serve, port: int) -> str:
    """Returns what is printed once clients can connect."""
    about, spec = desk.metadata, desk.policy.spec
    here = f"[{options.host}]" if ":" in options.host else options.host  # IPv6
    host = "127.0.0.1" if options.host in ("0.0.0.0", "::") else here
    key = f", api_key=open({str(options.key_file)!r}).read().strip()" if options.key_file else ""
    blank = ", ".join(f"{k!r}: np.zeros({tuple(x['shape'])}, {x['dtype']!r})" for k, x in about["observation"].items())
    lines = [
        f"serving {about['policy']} for {about['env']}, revision {about['revision']}",
        f"address       ws://{here}:{port} (openpi), ws://{here}:{port}/vla-eval (vla-eval)",
        "observations  " + " + ".join(f"{k} {x['shape']} {x['dtype']}" for k, x in about["observation"].items()),
        f"actions       {[spec.horizon, about['action_dim']]} in {range_text(*action_range(spec))}",
        f"also takes    {', '.join(about['supports'])}",
        'try           python -c "import numpy as np; from openpi_client.websocket_client_policy import '
        f'WebsocketClientPolicy as P; print(P({host!r}, {port}{key}).infer({{{blank}}}))"',
        f"health        http://{host}:{port}/healthz   metrics http://{host}:{port}/metrics   Ctrl-C stops",
    ]
    if options.host not in LOOPBACK and not options.key_file:
        lines.append("note: whoever reaches this machine can ask for actions; --key-file FILE asks them for a key")
    return "\n".join(lines)
