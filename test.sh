#!/usr/bin/env bash
# Lint, types, tests: what CI runs. `./test.sh --help` explains the use of it.
set -euo pipefail

usage() {
  cat <<'END'
Usage: ./test.sh [PYTEST ARGUMENT...]

Runs ruff check, ruff format --check and mypy, and if they find nothing, pytest with the given
arguments. Sets itself up: on the first call it makes .venv. Without -m, slow tests (some eight
seconds or more) and full ones (full data, nets of full size) are left out.

  ./test.sh                          everything but the slow and the full tests
  ./test.sh -m 'not full'            what CI runs
  ./test.sh -m full                  the full tests only
  ./test.sh -m ''                    all tests
  ./test.sh tests/test_scripts.py    one file
  ./test.sh -k resume -x             by name, stopping at the first failure
END
}

# Does the caller select tests by marker himself (-m EXPRESSION or -mEXPRESSION)?
selects_by_marker() {
  local argument
  for argument in "$@"; do
    if [[ $argument == -m* ]]; then return 0; fi
  done
  return 1
}

main() {
  if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    usage
    exit 0
  fi
  CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
  # shellcheck source=setup_env.sh
  source ./setup_env.sh
  set_up_environment dev

  heading 'ruff check'
  "$PYTHON" -m ruff check .
  heading 'ruff format --check'
  "$PYTHON" -m ruff format --check .
  heading 'mypy'
  "$PYTHON" -m mypy

  heading 'pytest'
  if ! selects_by_marker "$@"; then set -- -m 'not slow and not full' "$@"; fi
  # A file is one worker's: its tests share what they set up.
  exec "$PYTHON" -m pytest -n auto --dist loadfile "$@" # its closing line is this script's last
}

main "$@"
