#!/bin/sh
# Makes .venv with the versions of constraints.txt, or brings it up to date. `make setup` calls it; PYTHON=... chooses
# the interpreter. .venv/.ready holds the folder that a finished .venv was made in, so that a copied one is told from it;
# .venv/.unfinished marks one that was interrupted. Both are made again; a .venv with neither is somebody's own.
set -eu
cd "$(dirname "$0")/.."
here=$(pwd -P)
PATH=$(echo ":$PATH:" | sed "s|:$here/.venv/bin:|:|g; s/^://; s/:\$//") # an activated .venv must not make itself again

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    found=$("${PYTHON:-python3}" --version 2>/dev/null || echo "not there")
    echo "setup: ${PYTHON:-python3} is $found; Pentode needs Python 3.11 or newer: make setup PYTHON=/path/to/it" >&2
    exit 1
}

# Linux without an NVIDIA driver, and pip knows no other place to take torch from: say what is coming.
warn_of_gpu_build() {
    case "$(uname -s) $($pip config list)" in
    Darwin* | *index* | *find-links*) return ;;
    esac
    [ -e /proc/driver/nvidia ] ||
        echo "setup: no NVIDIA GPU here, and pip takes torch's GPU build, several GB; CONTRIBUTING.md, 'CPU only': how not to"
}

if [ "$(cat .venv/.ready 2>/dev/null)" != "$here" ] || ! new_enough .venv/bin/python; then
    python=$(find_python)
    if [ -e .venv ] && [ ! -e .venv/.ready ] && [ ! -e .venv/.unfinished ]; then
        aside=.venv.$(date +%Y%m%d-%H%M%S)
        echo "setup: the .venv here was not made by make; it is $aside now"
        mv .venv "$aside"
    fi
    rm -rf .venv
    echo "setup: making .venv with $("$python" --version); torch is large, this takes a minute or more"
    mkdir .venv
    touch .venv/.unfinished
    "$python" -m venv .venv
else
    echo "setup: bringing .venv up to date"
fi
touch .venv/.unfinished
rm -f .venv/.ready

# The build backend comes first, so that the package itself is built without a network. Not compiling what may never be
# imported saves a good part of the time. -qq leaves errors.
pip=".venv/bin/python -m pip --disable-pip-version-check"
install="$pip install -qq --no-compile -c constraints.txt"
warn_of_gpu_build
$install hatchling editables
$install --no-build-isolation -e ".[dev]"
if [ -n "${PYTHONDONTWRITEBYTECODE:-}" ]; then # then nobody would ever compile it: each import of torch takes 3 s more
    env -u PYTHONDONTWRITEBYTECODE .venv/bin/python -m compileall -qq -j 0 -x '/(tests?|_internal|models|onnx|quantization)/' .venv/lib || true
fi
rm .venv/.unfinished
echo "$here" >.venv/.ready
echo "setup: done"
