# What .ci/run and .ci/package share. They run in the repository's folder; `root` holds environments and goes at the end.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
export JAX_PLATFORMS=cpu PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_QUIET=1

step() { printf '\n== %s (%ss)\n' "$1" "$SECONDS"; }
# The command of a Python, or where pyenv keeps it.
find_python() { "python$1" -c "import sys; print(sys.executable)" 2>/dev/null || ls "$HOME/.pyenv/versions/$1".*/bin/"python$1" | tail -n 1; }
# Pins decide every version that is not given here; an environment of its own has each of them. Modules are compiled when they
# are imported, as most never are.
environment() { "$(find_python "$1")" -m venv "$root/$2" && "$root/$2/bin/pip" install --no-compile -c ".ci/pins/$3.txt" "${@:4}"; }
