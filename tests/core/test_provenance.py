"""Where a row comes from: the commit of the source."""

import os
import subprocess

from hypergrad.runtime.provenance import source_commit


def run_git(folder, *args):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    command = ["git", "-C", str(folder), *identity, *args]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return result.stdout.strip()


def test_the_commit_is_read_without_a_write_to_the_clone(tmp_path):
    """A file with a new time and its old content makes git refresh the index."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("x = 1\n")
    run_git(tmp_path, "init", "-q")
    run_git(tmp_path, "add", ".")
    run_git(tmp_path, "commit", "-qm", "first")
    commit = run_git(tmp_path, "rev-parse", "HEAD")
    os.utime(package / "__init__.py", (10**9, 10**9))
    index = (tmp_path / ".git" / "index").read_bytes()
    assert source_commit(package) == commit
    assert (tmp_path / ".git" / "index").read_bytes() == index
    (package / "__init__.py").write_text("x = 2\n")
    assert source_commit(package) == f"{commit}+"
