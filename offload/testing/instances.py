"""An instance in a temporary folder, for tests of what works for one."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path

from offload.config import Config
from offload.ids import new_id
from offload.instance import Instance


def make_instance(folder: Path, tables: Mapping[str, object] | None = None) -> Instance:
    """An instance whose folders lie in `folder`; `tables` as in the configuration file.

    `folder` must be short: it holds unix sockets.
    """
    state, runtime = folder / "state", folder / "run"
    for path in (state, runtime):
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    config = Config.model_validate(
        {"state_dir": str(state), "runtime_dir": str(runtime), **(tables or {})}
    )
    return Instance(
        config=config, config_path=None, state_dir=state, runtime_dir=runtime, id=new_id()
    )


def free_port() -> int:
    """A port of 127.0.0.1 that nobody has just now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port
