# shellcheck shell=bash
# The Python environment of demo.sh and test.sh. Sourced, not run.
#
#   setup_env REQUIREMENTS    makes or mends .venv and installs that file if need be
#
# What is installed is noted in a stamp inside .venv: the version of Python and the text of the requirements. While the
# stamp agrees, nothing is installed and the network is not touched. PYTHON names the interpreter to build from. pip gets
# no option but the file: its own configuration and PIP_* variables decide where packages come from.
#
# Exits with 2 where Python is missing or unfit, with 1 where pip fails.

ROOT="$(CDPATH='' cd -- "${BASH_SOURCE[0]%setup_env.sh}.." && pwd)"
VENV="$ROOT/.venv"
VENV_PYTHON="$VENV/bin/python"
SUPPORTED="3.10 3.11 3.12 3.13"
CPU_INDEX="https://download.pytorch.org/whl/cpu"
SCRIPT="$(printf %q "$0")" # for messages that a user may copy

# Everything here, pip too, writes to stderr, so that the output of what runs afterwards can be piped.
say() { printf 'gavel: %s\n' "$@" >&2; }

die() {
  say "$@"
  exit 2
}

# Print MAJOR.MINOR of an interpreter; fail if it does not run. Python 2 can parse this too.
python_version() { "$1" -c 'import sys; sys.stdout.write("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

is_supported() { [[ " $SUPPORTED " == *" $1 "* ]]; }

# Set BASE_PYTHON and BASE_VERSION to the interpreter to build from: $PYTHON, else the first on PATH that will do.
find_python() {
  local -a candidates=(python3 python3.13 python3.12 python3.11 python3.10)
  local candidate version found=""
  [[ -z "${PYTHON:-}" ]] || candidates=("$PYTHON")
  for candidate in "${candidates[@]}"; do
    version="$(python_version "$candidate")" || continue
    if is_supported "$version"; then
      # Where a virtual environment is active, perhaps the very one to be made anew, the Python that it stands on.
      BASE_PYTHON="$("$candidate" -c 'import sys; print(sys._base_executable)')"
      BASE_VERSION="$version"
      return
    fi
    found+="${found:+, }$candidate is Python $version"
  done
  if [[ -z "$found" ]]; then
    [[ -n "${PYTHON:-}" ]] && found="PYTHON=$PYTHON does not run" || found="no python3 was found on PATH"
  fi
  die "Python 3.10, 3.11, 3.12 or 3.13 is needed, but $found." \
    "Install one (from python.org or your package manager), or name one: PYTHON=/path/to/python3.12 $SCRIPT"
}

make_venv() {
  find_python
  "$BASE_PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
    die "$BASE_PYTHON lacks the modules venv and ensurepip, which make virtual environments." \
      "On Debian or Ubuntu: sudo apt install python$BASE_VERSION-venv. Or name another Python: PYTHON=... $SCRIPT"
  [[ ! -L "$VENV" ]] || die "$VENV is a link, and what it points to is not this script's to clear. Remove the link."
  say "making .venv with Python $BASE_VERSION ($BASE_PYTHON)"
  rm -f -- "$VENV/pyvenv.cfg" # first of all: a clearing cut short must not look like a finished environment
  "$BASE_PYTHON" -m venv --clear "$VENV" >&2 || die "could not make $VENV: Python's message is above."
}

# Whether everything in .venv is what a venv, or one cut short, has at its top; nothing else is ours to clear.
is_clearable() {
  [[ -d "$VENV" && -z "$(find "$VENV/" -mindepth 1 -maxdepth 1 ! -name bin ! -name include ! -name lib ! -name lib64 \
    ! -name share ! -name .gitignore ! -name '*.stamp*')" ]]
}

# Leave a .venv with a working Python of the right version, and with pip unless REQUIREMENTS are installed already.
ensure_venv() {
  local version
  version="$(python_version "$VENV_PYTHON")" || version=""
  if [[ ! -e "$VENV" ]]; then
    :
  elif [[ ! -f "$VENV/pyvenv.cfg" ]]; then
    is_clearable || die "$VENV is not a virtual environment. Move it away and run this again."
    say ".venv is half made: making it anew"
  elif [[ -z "$version" ]]; then
    say "the Python that .venv was made with is gone: making it anew"
  elif ! is_supported "$version"; then
    say ".venv has Python $version, which is not one of $SUPPORTED: making it anew"
  elif [[ -n "${PYTHON:-}" ]] && find_python && [[ "$version" != "$BASE_VERSION" ]]; then
    say ".venv has Python $version, and PYTHON=$PYTHON is $BASE_VERSION: making it anew"
  elif ! is_installed "$1" && ! "$VENV_PYTHON" -m pip --version >/dev/null 2>&1; then
    say ".venv is half made (it has no pip): making it anew"
  else
    return 0
  fi
  make_venv
}

# The same text for every requirements file: a change in one makes pip look again, which costs a second.
stamp_text() {
  echo "Python $(python_version "$VENV_PYTHON")"
  cat -- "$ROOT"/requirements*.txt
}

# requirements-dev.txt includes all the others, so its stamp answers for them.
is_installed() {
  local file
  for file in "$1" requirements-dev.txt; do
    [[ -f "$VENV/$file.stamp" && "$(<"$VENV/$file.stamp")" == "$(stamp_text)" ]] && return 0
  done
  return 1
}

# Where there is no NVIDIA driver, say before PyTorch is downloaded how to get its CPU build.
hint_cpu_build() {
  [[ "$OSTYPE" == linux* && ! -e /proc/driver/nvidia ]] || return 0
  ! command -v nvidia-smi >/dev/null || return 0
  ! compgen -G "$VENV/lib/python*/site-packages/torch-*.dist-info" >/dev/null || return 0
  [[ "$("$VENV_PYTHON" -m pip config list 2>/dev/null)" != *"$CPU_INDEX"* ]] || return 0
  # An *extra* index: the packages beside torch come from the usual one, and pip takes 2.13.0+cpu before 2.13.0.
  say "no NVIDIA driver found. Unless your pip is set up otherwise, it now downloads PyTorch for CUDA, several GB." \
    "The CPU build is about 200 MB. To get it, stop here (Ctrl-C) and run" \
    "    PIP_EXTRA_INDEX_URL=$CPU_INDEX $SCRIPT" \
    "To change over later, remove .venv first."
}

setup_env() {
  local info
  ensure_venv "$1"
  ! is_installed "$1" || return 0
  rm -f -- "$VENV"/requirements*.stamp*
  hint_cpu_build
  # pip writes RECORD last. Without it a package may be half there, and pip would still take it for installed.
  for info in "$VENV"/lib/python*/site-packages/*.dist-info; do
    [[ -f "$info/RECORD" ]] || rm -rf -- "$info"
  done
  say "installing $1"
  if ! "$VENV_PYTHON" -m pip install -r "$ROOT/$1" >&2; then
    say "pip could not install $1: its message is above. Run this again to go on from here."
    exit 1
  fi
  stamp_text >"$VENV/$1.stamp.new"
  mv -- "$VENV/$1.stamp.new" "$VENV/$1.stamp"
}
