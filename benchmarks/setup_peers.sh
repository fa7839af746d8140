#!/usr/bin/env bash
# Makes the Python environments of the peers. `benchmarks/setup_peers.sh --help` explains the use of it.
set -euo pipefail

usage() {
  cat <<'END'
Usage: benchmarks/setup_peers.sh [torch] [keras]

Makes the environments of the libraries that `python -m fmbench.benchmark` compares fmbench with,
with the versions pinned in benchmarks/requirements-*.txt. Without arguments it makes both; what is
there already and right is left alone. stock Flax needs none: it runs in fmbench's own environment.

  torch    benchmarks/.venv-torch, 1 GB; torch.compile also needs a C++ compiler
  keras    benchmarks/.venv-keras, 1.6 GB

FMBENCH_PEERS_DIR names another folder for the environments than benchmarks/. Where a Python has
the library already, as PyTorch for a GPU, FMBENCH_TORCH_PYTHON names it, and nothing is set up.
pip's own settings (PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS) say where packages come from: on Linux, PyPI's
PyTorch brings some 3 GB of CUDA libraries, which PyTorch's own index of CPU wheels (pytorch.org, Get
Started) avoids.

Exit status: 0 done, 1 set-up failed, 2 a mistake in the command.
END
}

# is_right VENV REQUIREMENTS: does the environment start, and hold the pinned versions?
is_right() {
  "$1/bin/python" -I - "$2" <<'END' >/dev/null 2>&1
import sys
from importlib.metadata import version
from pathlib import Path

for line in Path(sys.argv[1]).read_text().splitlines():
    if pin := line.partition("#")[0].strip():
        name, wanted = pin.split("==")
        assert version(name).partition("+")[0] == wanted  # 2.13.0+cpu is 2.13.0
END
}

# install_requirements VENV REQUIREMENTS: the installer's messages are shown if it fails.
install_requirements() {
  local messages
  if have_uv; then
    messages=$(env -u UV_SYSTEM_PYTHON uv pip install --python "$1/bin/python" --quiet --requirement "$2" 2>&1)
  else
    messages=$(PIP_USER=0 PIP_REQUIRE_HASHES=0 "$1/bin/python" -I -m pip install --quiet \
      --disable-pip-version-check --only-binary :all: --requirement "$2" 2>&1)
  fi || {
    complain "$messages"
    return 1
  }
}

# set_up PEER FOLDER: makes one environment, or finds nothing to do.
set_up() {
  local requirements=benchmarks/requirements-$1.txt venv=$2/.venv-$1 python
  if [[ $(cat "$venv/.fmbench-setup" 2>/dev/null) == "$(cksum "$requirements")" ]] &&
    is_right "$venv" "$requirements"; then
    echo "$venv is ready."
    return
  fi
  if ! python=$(newest_python); then
    explain_missing_python
    return 1
  fi
  heading "Setting up $venv with $("$python" --version) (a few minutes, once) ..."
  new_venv "$python" "$venv" || return
  install_requirements "$venv" "$requirements" || return
  if ! is_right "$venv" "$requirements"; then
    complain "$venv does not hold the versions of $requirements."
    return 1
  fi
  cksum "$requirements" >"$venv/.fmbench-setup"
}

main() {
  local peer peers=() folder=${FMBENCH_PEERS_DIR:-}
  for peer in "$@"; do
    case $peer in
      -h | --help)
        usage
        exit 0
        ;;
      torch | keras) peers+=("$peer") ;;
      *)
        printf '%s\n' "Unknown peer '$peer': expected torch, keras or --help." >&2
        exit 2
        ;;
    esac
  done
  if ((${#peers[@]} == 0)); then peers=(torch keras); fi

  # A relative folder is relative to where the command was given.
  if [[ -n $folder && $folder != /* ]]; then folder=$PWD/$folder; fi
  CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
  # shellcheck source=setup_env.sh
  source ./setup_env.sh
  # The peers' speed does not depend on the Python; 3.11 is the version most wheels exist for.
  # shellcheck disable=SC2034  # newest_python and explain_missing_python read it
  SUPPORTED_PYTHONS='3.11 3.12 3.13'

  for peer in "${peers[@]}"; do
    if ! set_up "$peer" "${folder:-benchmarks}"; then
      complain "Setting up the environment for $peer failed, for the reason given above."
      exit 1
    fi
  done
}

main "$@"
