#!/usr/bin/env bash
# Install the project into a virtual environment with the versions of infra/constraints.txt.
# Usage: infra/install.sh FOLDER        PYTHON=… names an interpreter (default: the first of 3.11 … 3.13 found)
#
# What infra/hashes.txt lists is installed from files with those hashes and no others, by uv in a third of pip's time, and
# by pip where uv cannot. torch follows by pip, which also sees wheels in a local find-links folder: its hash depends on
# the index. Last come the project itself and what another platform needs in addition. The log is FOLDER/install.log; every
# failure prints one line.
set -euo pipefail

folder=${1:?usage: infra/install.sh FOLDER}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
constraints=infra/constraints.txt
hashes=infra/hashes.txt
needed_gb=4

fail() { echo "error: $*" >&2; exit 1; }
new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

free_kb=$(df -Pk . | awk 'NR == 2 {print $4}')
((free_kb >= needed_gb * 1024 * 1024)) ||
    fail "only $((free_kb / 1024)) MB are free in $PWD, the installation needs $needed_gb GB; free some space and repeat."

if ! { [ -x "$folder/bin/python" ] && new_enough "$folder/bin/python"; }; then
    python=
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do # the lock was resolved on 3.11
        if new_enough "$candidate"; then python=$candidate && break; fi
    done
    [ -n "$python" ] || fail "no Python 3.11 or newer found; install one, or name it: make venv PYTHON=/path/to/python3.11"
    "$python" -m venv --clear "$folder" >/dev/null ||
        fail "'$python -m venv $folder' failed; on Debian and Ubuntu install the package python3-venv."
fi

log=$folder/install.log
: >"$log"
pip=("$folder/bin/python" -m pip install --quiet --disable-pip-version-check)
# Compiled here once: where Python may not write bytecode (containers, CI), each command would do it for all it imports.
uv=("$folder/bin/uv" pip install --compile-bytecode --python "$folder/bin/python")
checked=(--require-hashes --no-deps -r)
what_to_do="no network, no such version, or a file with another hash? Details: $log. Then repeat 'make venv'; it continues where it stopped."

echo "Installing into $folder (about 3 GB; 1 to 5 minutes) …"
awk '/^uv==/, !/\\$/' "$hashes" >"$folder/uv.txt" # its lines alone: it installs the others
if ! { "${pip[@]}" "${checked[@]}" "$folder/uv.txt" && "${uv[@]}" "${checked[@]}" "$hashes"; } >>"$log" 2>&1; then
    echo "uv could not install the locked packages; trying pip …"
    "${pip[@]}" "${checked[@]}" "$hashes" >>"$log" 2>&1 || fail "the packages could not be installed: $what_to_do"
fi
"${pip[@]}" -c "$constraints" "$(grep '^torch==' "$constraints")" >>"$log" 2>&1 ||
    fail "torch could not be installed: $what_to_do"
if ! "${uv[@]}" -c "$constraints" -e ".[dev]" >>"$log" 2>&1; then
    "${pip[@]}" -c "$constraints" -e ".[dev]" >>"$log" 2>&1 || fail "the project could not be installed: $what_to_do"
fi
touch "$folder/.installed"
echo "Ready: $("$folder/bin/python" --version), $folder"
