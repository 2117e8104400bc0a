#!/usr/bin/env bash
# Builds wheel and sdist, and tries the wheel as a user would, in an empty environment and
# an empty folder. `.ci/run newest` runs the tests of the sdist. Usage: try_release.sh PYTHON
set -euo pipefail
python=$(realpath --no-symlinks "$1")
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
folder=$root/.cache/release

# The n-th block of Python code of a Markdown file.
python_block() {
    awk -v n="$2" '/^```python/ { block++; next }
        { if (block == n && !ended) print } /^```/ { if (block == n) ended = 1 }' "$1" |
        grep -v '^```'
}

rm -rf "$folder"
mkdir -p "$folder/empty"
"$python" -m build --outdir "$folder/dist" "$root" > "$folder/build.log"

"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    "$(echo "$folder"/dist/*.whl)[cli]"
cd "$folder/empty"
echo "the first example of the README, with the wheel:"
python_block "$root/README.md" 1 > example.py
"$folder/venv/bin/python" example.py
echo "a table of one file, with the wheel:"
python_block "$root/docs/tables.md" 2 > table.py
"$folder/venv/bin/hypergrad" run table.py --seeds 1
