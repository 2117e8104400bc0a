"""Python source that runs in a process of its own."""

import os
import pty
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def start_python(
    source: str, *arguments: Any, env: Mapping[str, str] | None = None, **options: Any
) -> subprocess.Popen:
    """Starts the source in the root of the repository, with further variables."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(source), *map(str, arguments)],
        cwd=ROOT, env=os.environ | (env or {}), text=True, **options,
    )  # fmt: skip


def run_python(
    source: str, *arguments: Any, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess:
    """Runs the source and returns what it printed; AssertionError if it fails."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with start_python(source, *arguments, env=env, **pipes) as process:
        stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    return subprocess.CompletedProcess(process.args, 0, stdout, stderr)


def run_in_terminal(
    source: str, *arguments: Any, env: Mapping[str, str] | None = None
) -> tuple[str, int]:
    """Returns what the source wrote to a terminal as its errors, and its status."""
    own_end, other_end = pty.openpty()
    env = {"TERM": "xterm"} | dict(env or {})
    process = start_python(source, *arguments, env=env, stderr=other_end)
    os.close(other_end)
    content = b""
    try:
        while new_bytes := os.read(own_end, 4096):
            content += new_bytes
    except OSError:  # EIO on Linux: the other end was closed
        pass
    os.close(own_end)
    return content.decode(), process.wait()
