"""Where each peer is installed: `python -m benchmarks.peers.environments` does it.

One environment a library, since some of them exclude each other (two are distributed
under one name). What does not install is named and the rest goes on: a contender that
cannot import its library says so in its row.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
INTERPRETER = "python3.11"  # the newest that all of them run on

TORCH = ["numpy", "torch==2.13.0"]
REQUIREMENTS = {
    "torch": TORCH,
    "higher": [*TORCH, "higher==0.2.1"],
    "torchopt": [*TORCH, "torchopt==0.7.3"],
    "betty": [*TORCH, "betty-ml==0.1.1"],
    "boat": [*TORCH, "boat-torch==1.1.1"],
    "moskomule": [*TORCH, "hypergrad==0.0.1"],
    "hypertorch": [
        *TORCH,
        "git+https://github.com/prolearner/hypertorch"
        "@6241dfafcf37ddaf14e152ba5e5a3aa7165396d3",
    ],
    "learn2learn": [
        "--use-pep517",
        "--no-build-isolation",
        "--config-settings=--build-option=build_ext",
        "learn2learn==0.2.0",
    ],
}
# Installed before the library. The C files in the sdist of learn2learn 0.2.0 do not
# compile on Python 3.11. With `build_ext` above, which reaches its script by PEP 517
# alone, and the variable below, Cython writes them anew.
BUILD_REQUIREMENTS = {"learn2learn": [*TORCH, "cython", "setuptools", "wheel"]}
BUILD_VARIABLES = {"CYTHON_FORCE_REGEN": "1"}
SHARED = {"torch_by_hand": "torch", "torch_func": "torch"}


def python(contender: str) -> Path:
    """That runs `contender`: its library's, or this one where it needs none."""
    name = SHARED.get(contender, contender)
    if name not in REQUIREMENTS:
        return Path(sys.executable)
    return ROOT / ".venv-peers" / name / "bin" / "python"


def install(name: str) -> str:
    """The last that was said where it failed, nothing where it is there now."""
    place = python(name).parents[1]
    quiet = ["--quiet", "--disable-pip-version-check"]
    pip = [str(python(name)), "-m", "pip", "install", *quiet]
    commands = [[INTERPRETER, "-m", "venv", str(place)]]
    if name in BUILD_REQUIREMENTS:
        commands.append([*pip, *BUILD_REQUIREMENTS[name]])
    commands.append([*pip, *REQUIREMENTS[name]])
    for command in commands:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, **BUILD_VARIABLES},
        )
        if done.returncode:
            return done.stderr.strip().rpartition("\n")[2]
    return ""


def main() -> None:
    """Installs all and says which are there."""
    if shutil.which(INTERPRETER) is None:
        sys.exit(f"peers: no {INTERPRETER} was found; their releases need it")
    for name in REQUIREMENTS:
        reason = install(name)
        print(f"{name:12} {'failed: ' + reason if reason else 'installed'}", flush=True)


if __name__ == "__main__":
    main()
