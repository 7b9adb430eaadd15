"""What Ray reads from the environment, which it does once, when it is first imported.

So it is set as soon as a configuration names Ray: other packages import Ray where it is installed, as
transformers does to find out what Ray has.
"""

from __future__ import annotations

import os
import secrets

AUTO = "auto"  # the address of a cluster of this machine alone
# For every process of this program on Ray. Ray would report as well that usage statistics are off.
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_USAGE_STATS_REPORT_URL": "http://127.0.0.1:9",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}
# Of a cluster of this machine alone. The first one makes it listen on loopback only; the last two leave it to
# the system to end a process when memory is short, and the priority of its processes as it is.
LOCAL = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_worker_niceness": "0",
}
TOKEN = "RAY_AUTH_TOKEN"


def set_environment(address: str) -> None:
    """Prepare this process, and those that Ray starts from it, for a cluster."""
    os.environ.update(QUIET)
    if address == AUTO:
        os.environ.update(LOCAL)
        os.environ.setdefault(TOKEN, secrets.token_hex(32))
