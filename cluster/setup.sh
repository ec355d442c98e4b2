#!/usr/bin/env bash
# Makes .venv with the pinned CPU set, or does nothing if it stands. `--dev` adds the gate's tools.
set -euo pipefail
cd "$(dirname "$0")/.."

files=(cluster/requirements-cpu.txt)
[ "${1:-}" = --dev ] && files+=(cluster/requirements-dev.txt)
torch=torch==2.13.0+cpu

# One stamp per requirements file, so that the quickstart's set-up serves the gate too.
missing=()
for file in "${files[@]}"; do
    want=$(cat "$file" cluster/setup.sh pyproject.toml | sha256sum | cut -c1-16)
    stamp=.venv/.$(basename "$file" .txt).stamp
    [ "$(cat "$stamp" 2>/dev/null)" = "$want" ] || missing+=("$file $stamp $want")
done
[ ${#missing[@]} -gt 0 ] || exit 0

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || {
    echo "error: $("$python" --version) is not what the lock file is for; install Python 3.11 or set PYTHON=/path/to/python3.11" >&2
    exit 1
}
command -v g++ >/dev/null || {
    echo "error: no C++ compiler; install one (Debian: apt-get install g++)" >&2
    exit 1
}

"$python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null || {
    echo "error: no libnuma, which vLLM needs on CPUs; install it (Debian: apt-get install libnuma1)" >&2
    exit 1
}

echo "setting up .venv (once, some minutes) ..."
# One that was broken off, or made without python3-venv, has no pip.
.venv/bin/python -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear .venv
# pip would compile with one core; below, all do.
install=(.venv/bin/python -m pip install -qq --disable-pip-version-check --no-deps --no-compile)
if ! .venv/bin/python -m pip show -qq "${torch%%=*}" 2>/dev/null; then
    "${install[@]}" "$torch" 2>/dev/null ||
        "${install[@]}" "$torch" --index-url https://download.pytorch.org/whl/cpu || {
        echo "error: pip finds no $torch, neither where it looks by itself nor at PyTorch's CPU index" >&2
        exit 1
    }
fi
for entry in "${missing[@]}"; do
    read -r file stamp want <<<"$entry"
    "${install[@]}" -r "$file"
    [ "$file" = cluster/requirements-cpu.txt ] && "${install[@]}" --no-build-isolation -e .
    # It fails where a package holds a file for another Python, which is no harm.
    .venv/bin/python -W ignore -m compileall -qq -j 0 .venv/lib || true
    echo "$want" >"$stamp"
done
echo "set up .venv in ${SECONDS} s"
