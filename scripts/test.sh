#!/usr/bin/env bash
# Run the linter and the tests: make .venv, install requirements-dev.txt, ruff, then pytest.
#
#   scripts/test.sh                                      # on all cores, but for the tests marked slow
#   scripts/test.sh --all                                # the slow ones too, as CI does
#   scripts/test.sh tests/test_judge.py -k greedy -x     # pytest with your arguments, on one core
#
# Exits with pytest's code, or with ruff's where only ruff found faults. No GPU and, once installed, no network needed.
set -euo pipefail

# shellcheck source=scripts/setup_env.sh
source "${BASH_SOURCE[0]%test.sh}./setup_env.sh"

setup_env requirements-dev.txt
cd -- "$ROOT"

lint_status=0
"$VENV_PYTHON" -m ruff check . || lint_status=$?
if ((lint_status)); then
  say "ruff found faults (above): this run will fail, whatever the tests say"
fi

# A file's tests stay in one process, as they share what is slow to make.
parallel=(-n auto --maxprocesses 8 --dist loadfile)
case "${1:-}" in
  "") options=("${parallel[@]}" -m "not slow") ;;
  --all) options=("${parallel[@]}" "${@:2}") ;;
  *) options=("$@") ;;
esac

test_status=0
"$VENV_PYTHON" -m pytest -q --durations=10 "${options[@]}" || test_status=$?
exit $((test_status ? test_status : lint_status))
