# shellcheck shell=bash
# Finds or makes the Python environment that fmbench runs in. run_all.sh and test.sh source this
# file and call, from the repository's folder,
#
#     set_up_environment [EXTRA...] [--without=PACKAGE]    # leaves the environment's interpreter in $PYTHON
#
# An environment that is there already may lack PACKAGE.
#
# which takes the first of these that applies:
#   1. the folder named by $FMBENCH_VENV, if that is set (made on the first call);
#   2. the active environment, if it can run fmbench (and has the named extras);
#   3. .venv in the repository (made on the first call, reused by later ones).
#
# What goes into an environment made here is fixed by constraints.txt, whether uv or pip installs it.

# Newest first: newer Pythons get a newer jax, which is faster on CPUs.
SUPPORTED_PYTHONS='3.13 3.12 3.11'

# ---------------------------------------------------------------------------- messages

# Bold text for people, plain text for pipes and files.
if [[ -t 1 && -z ${NO_COLOR:-} && ${TERM:-dumb} != dumb ]]; then
  BOLD=$'\033[1m' PLAIN=$'\033[0m'
else
  BOLD='' PLAIN=''
fi

heading() { printf '%s%s%s\n' "$BOLD" "$*" "$PLAIN"; }

complain() { printf '%s\n' "$@" >&2; }

# ---------------------------------------------------------------------------- an environment's state

# can_run_fmbench PYTHON [EXTRA...] [--without=PACKAGE]: can this interpreter import fmbench, and does it have
# what pyproject.toml asks for, but for that package? If not, the last line printed says what is missing. Reading the
# packages' metadata answers in a tenth of a second; importing jax would take two seconds.
# -P keeps the current directory off the path: fmbench/ lying here does not make it installed.
can_run_fmbench() {
  local python=$1
  shift
  "$python" -P - "$@" <<'END' 2>&1
import importlib.util
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version

from packaging.requirements import Requirement

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
needed = list(project["dependencies"])
without = {word.removeprefix("--without=") for word in sys.argv[1:] if word.startswith("--without=")}
for extra in sys.argv[1:]:
    if not extra.startswith("--without="):
        needed += project["optional-dependencies"][extra]
for requirement in map(Requirement, needed):
    if requirement.name == project.get("name"):  # one extra in another
        for extra in requirement.extras:
            needed += project["optional-dependencies"][extra]
        continue
    if requirement.name in without or (requirement.marker and not requirement.marker.evaluate()):
        continue
    try:
        installed = version(requirement.name)
    except PackageNotFoundError:
        sys.exit(f"{requirement} is not installed")
    if not requirement.specifier.contains(installed, prereleases=True):
        sys.exit(f"{requirement} is needed, {requirement.name} {installed} is installed")
if importlib.util.find_spec("fmbench") is None:
    sys.exit("fmbench is not installed")
END
}

# Changes whenever an environment made earlier may no longer hold the right packages.
fingerprint() { cksum pyproject.toml constraints.txt; }

# ---------------------------------------------------------------------------- choosing a Python

# uv may be a pyenv shim that fails, so it has to start before it is believed in.
have_uv() { uv --version >/dev/null 2>&1; }

# is_python CANDIDATE VERSION: prints the interpreter's own path if CANDIDATE is a Python of that
# version that can make environments. pyenv keeps shims for versions that are not activated, and
# those fail when started; Debian's python3 lacks ensurepip until python3-venv is installed.
is_python() {
  local needed='import venv, ensurepip'
  if have_uv; then needed=''; fi # it makes environments without them
  "$1" -I -c "
import sys, sysconfig
$needed
free_threaded = sysconfig.get_config_var('Py_GIL_DISABLED')  # jaxlib has no wheels for it
if '%d.%d' % sys.version_info[:2] != '$2' or free_threaded:
    sys.exit(1)
print(sys.executable)" 2>/dev/null
}

# All that might be Python VERSION, one a line. All of PATH counts, since a working python3.13
# may hide behind a shim of the same name.
python_candidates() {
  type -aP "python$1" python3 python || true
  if have_uv; then uv python find --system --no-python-downloads "$1" 2>/dev/null || true; fi
  local python
  for python in "${PYENV_ROOT:-${HOME:-}/.pyenv}/versions/$1"*/bin/python; do
    if [[ -x $python ]]; then printf '%s\n' "$python"; fi
  done
}

# newest_python: prints the newest suitable interpreter's path; fails without one.
newest_python() {
  local version candidate
  for version in $SUPPORTED_PYTHONS; do
    while read -r candidate; do
      if is_python "$candidate" "$version"; then return 0; fi
    done < <(python_candidates "$version")
  done
  return 1
}

explain_missing_python() {
  complain "No suitable Python found: fmbench needs one of ${SUPPORTED_PYTHONS// /, }," \
    'with its venv and ensurepip modules. Found on PATH:'
  local python says
  while read -r python; do
    if ! says=$("$python" -c 'import platform; print("Python", platform.python_version())' 2>/dev/null); then
      says='does not start'
    elif ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
      says+=', without venv or ensurepip'
    fi
    complain "  $python: $says"
  done < <(type -aP python3 python || true)
  complain 'Install one (for example: apt-get install python3-venv; brew install python@3.13;' \
    'pyenv install 3.13; or uv, then: uv python install 3.13) and run this command again.'
}

# ---------------------------------------------------------------------------- making an environment

# new_venv PYTHON VENV: an empty environment. The mark goes in first, so that a set-up interrupted
# at any later moment leaves an environment that says so itself.
new_venv() {
  rm -rf -- "$2"
  mkdir -p -- "$2"
  echo unfinished >"$2/.fmbench-setup"
  if have_uv; then
    uv venv --quiet --allow-existing --python "$1" "$2"
  else
    "$1" -m venv "$2"
  fi
}

# install_packages VENV: fmbench itself (editable), what it needs, and what its tests need; and pip,
# which uv leaves out of an environment, and which installs further extras. The installer's messages
# are shown if it fails; its warnings about a user's configuration are not.
install_packages() {
  local wanted=(--quiet --constraint constraints.txt --editable '.[dev]' pip) messages
  if have_uv; then
    # UV_SYSTEM_PYTHON, usual in containers, would turn uv away from the environment.
    messages=$(env -u UV_SYSTEM_PYTHON uv pip install --python "$1/bin/python" "${wanted[@]}" 2>&1)
  else
    # The user's pip configuration may say where packages come from, not which: PIP_CONSTRAINT
    # takes the place of configured constraints, and the other two would break the installation.
    # -I: packages on a PYTHONPATH are not packages of this environment.
    messages=$(PIP_CONSTRAINT=constraints.txt PIP_USER=0 PIP_REQUIRE_HASHES=0 \
      "$1/bin/python" -I -m pip install --disable-pip-version-check "${wanted[@]}" 2>&1)
  fi || {
    complain "$messages"
    return 1
  }
}

# can_install_into VENV: does its Python start, and is there something to install packages with?
can_install_into() {
  if have_uv; then "$1/bin/python" -c ''; else "$1/bin/python" -m pip --version; fi >/dev/null 2>&1
}

# make_ready VENV [EXTRA...]: makes, repairs or updates the environment, or finds nothing to do.
make_ready() {
  local venv=$1 wanted found python
  shift
  wanted=$(fingerprint)
  found=$(cat "$venv/.fmbench-setup" 2>/dev/null || true)

  # Without a mark it is an environment somebody made by hand: welcome, if it is complete.
  if [[ -z $found || $found == "$wanted" ]] && can_run_fmbench "$venv/bin/python" "$@" >/dev/null; then
    return
  fi

  if [[ -n $found && $found != unfinished && $found != "$wanted" ]] && can_install_into "$venv"; then
    # Finished, but for another pyproject.toml or constraints.txt.
    heading "Bringing $venv up to date with pyproject.toml and constraints.txt ..."
    echo unfinished >"$venv/.fmbench-setup"
  else
    # Not there, never finished, or broken since: start from nothing.
    if ! python=$(newest_python); then
      explain_missing_python
      return 1
    fi
    if [[ -e $venv ]]; then complain "$venv is incomplete and is made anew."; fi
    heading "Setting up $venv with $("$python" --version) (about a minute, once) ..."
    new_venv "$python" "$venv" || return
  fi
  install_packages "$venv" || return
  printf '%s\n' "$wanted" >"$venv/.fmbench-setup"
}

# ---------------------------------------------------------------------------- the one to call

# active_python VENV [EXTRA...]: prints the active environment's interpreter if it can run
# fmbench. VENV, active or not, is left to make_ready, which also keeps it up to date.
active_python() {
  local venv=$1 python reason
  shift
  while read -r python; do
    if [[ ${python%/bin/*} -ef $venv ]]; then return 1; fi
    if reason=$(can_run_fmbench "$python" "$@"); then
      printf '%s\n' "$python"
      return 0
    fi
    # Whoever activated an environment expects it to be used, and is told why it is not.
    if [[ -n ${VIRTUAL_ENV:-} && $python == "$VIRTUAL_ENV/bin/python" ]]; then
      complain "Not using the active environment $VIRTUAL_ENV: ${reason##*$'\n'}."
    fi
  done < <(
    if [[ -n ${VIRTUAL_ENV:-} ]]; then printf '%s\n' "$VIRTUAL_ENV/bin/python"; fi
    type -P python python3 || true
  )
  return 1
}

set_up_environment() {
  local venv=${FMBENCH_VENV:-.venv}
  if [[ -z ${FMBENCH_VENV:-} ]] && PYTHON=$(active_python "$venv" "$@"); then
    :
  else
    # An existing folder that is no environment is somebody's data: never replaced.
    if [[ -n ${FMBENCH_VENV:-} && -n $(ls -A "$venv" 2>/dev/null) &&
      ! -e $venv/pyvenv.cfg && ! -e $venv/.fmbench-setup ]]; then
      complain "FMBENCH_VENV=$venv is a folder with other things in it." \
        'Name a folder that does not exist yet, or one that holds a virtual environment.'
      exit 2
    fi
    # Of two first calls at the same time, one sets up and the other waits (where flock exists).
    exec 9<.
    if type -P flock >/dev/null && ! flock --nonblock 9; then
      complain "Waiting for another set-up of $venv to finish ..."
      flock 9
    fi
    if ! make_ready "$venv" "$@"; then
      complain "Setting up $venv failed, for the reason given above. Run this command again to retry."
      exit 1
    fi
    exec 9<&-
    PYTHON=$venv/bin/python
    if [[ $PYTHON != /* ]]; then PYTHON=$PWD/$PYTHON; fi
  fi
  # The code that runs is this checkout's, even if the environment holds another copy of fmbench.
  export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
}
