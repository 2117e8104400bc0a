"""The environments of the peers; `python -m benchmarks.peers.environments` makes them.

Each library has an environment of its own, since some exclude each other: two are
distributed under one name. A library that cannot be installed is named, and its rows
state that it is missing.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
INTERPRETER = "python3.11"  # the newest that all libraries support

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
# Packages that are installed before the library. The C files in the sdist of
# learn2learn 0.2.0 do not compile on Python 3.11. With `build_ext` above, which its
# script receives by PEP 517 alone, and the variable below, Cython writes new ones.
BUILD_REQUIREMENTS = {"learn2learn": [*TORCH, "cython", "setuptools", "wheel"]}
BUILD_VARIABLES = {"CYTHON_FORCE_REGEN": "1"}
SHARED = {"torch_by_hand": "torch", "torch_func": "torch"}


def interpreter(contender: str) -> Path:
    """Returns the Python of a contender's environment, or this one if it has none."""
    name = SHARED.get(contender, contender)
    if name not in REQUIREMENTS:
        return Path(sys.executable)
    return ROOT / ".venv-peers" / name / "bin" / "python"


def install(name: str) -> str:
    """Installs a library and returns the last line of an error, or nothing."""
    folder = interpreter(name).parents[1]
    quiet = ["--quiet", "--disable-pip-version-check"]
    pip = [str(interpreter(name)), "-m", "pip", "install", *quiet]
    commands = [[INTERPRETER, "-m", "venv", str(folder)]]
    if name in BUILD_REQUIREMENTS:
        commands.append([*pip, *BUILD_REQUIREMENTS[name]])
    commands.append([*pip, *REQUIREMENTS[name]])
    for command in commands:
        process = subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, **BUILD_VARIABLES},
        )
        if process.returncode:
            return process.stderr.strip().rpartition("\n")[2]
    return ""


def main() -> None:
    """Installs all libraries and prints which are installed."""
    if shutil.which(INTERPRETER) is None:
        sys.exit(f"peers: no {INTERPRETER} was found; their releases need it")
    for name in REQUIREMENTS:
        reason = install(name)
        print(f"{name:12} {'failed: ' + reason if reason else 'installed'}", flush=True)


if __name__ == "__main__":
    main()
