#!/usr/bin/env bash
# Run the bundled pair, which answers stories of three or four events like the one below and nothing else: make .venv,
# install requirements.txt, then `python generate.py --judge` with your arguments.
#
#   scripts/demo.sh
#   scripts/demo.sh --prompt "Kim has two figs. First, Kim buys five figs. Second, Kim doubles the figs. Third, Kim sells four figs. How many figs does Kim have?"
#   PYTHON=python3.12 scripts/demo.sh          # another interpreter, from 3.10 to 3.13
#
# A second run installs nothing. pip's own settings (pip.conf, PIP_* variables) say where packages come from.
set -euo pipefail

# shellcheck source=scripts/setup_env.sh
source "${BASH_SOURCE[0]%demo.sh}./setup_env.sh"

setup_env requirements.txt
exec "$VENV_PYTHON" "$ROOT/generate.py" --judge "$@"
