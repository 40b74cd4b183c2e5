#!/usr/bin/env bash
# Sets up an environment beside the project and runs the command given, or the quickstart.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/magistral-jax ] || { python3 -m venv .venv && .venv/bin/pip install -c constraints.txt .; }
if [ $# -eq 0 ]; then
  set -- train configs/quickstart.toml
fi
exec .venv/bin/magistral-jax "$@"
