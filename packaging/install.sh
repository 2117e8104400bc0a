#!/bin/sh
# Installs packages into an environment: install.sh PYTHON ARGUMENTS_OF_PIP_INSTALL...
# uv needs seconds where pip needs a minute. pip is the fallback, because uv reads no
# pip.conf, and is not there for every machine.
python=$1
shift
"$python" -m pip install --quiet --disable-pip-version-check uv \
    && "$python" -m uv pip install --quiet --python "$python" "$@" \
    || exec "$python" -m pip install --quiet --disable-pip-version-check "$@"
