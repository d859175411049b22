#!/usr/bin/env bash
# Install what the GPU path needs: the Triton kernels of mamba-ssm. No CUDA compiler is used.
#
#   bash scripts/install_gpu.sh    into .venv, or into the virtual environment that is active
#
# Triton compiles kernels when they are first called, and needs a C compiler (gcc) and Python's
# headers for that.
set -euo pipefail
# shellcheck source=scripts/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
if [ -n "${VIRTUAL_ENV:-}" ] && [ "$VIRTUAL_ENV" != "$root/.venv" ]; then
  venv_python="$VIRTUAL_ENV/bin/python"
  "$venv_python" -c 'import batchrun, torch' 2>/dev/null ||
    fail "the active virtual environment $VIRTUAL_ENV has no batchrun" \
      "pip install -c constraints.txt -e '.[gpu]' in it first, or deactivate it to use .venv"
else
  prepare_venv gpu
fi

cuda="$("$venv_python" -c 'import torch; print(torch.version.cuda or "")')"
if [ -z "$cuda" ]; then
  fail "torch in $("$venv_python" -c 'import sys; print(sys.prefix)') is a CPU build" \
    "install the CUDA build of the same version (see constraints.txt) and run this again"
fi

"$venv_python" -m pip install -qq --disable-pip-version-check \
  --constraint "$root/constraints.txt" einops packaging setuptools
install_kernels

echo "Installed for CUDA $cuda. What this machine has:"
exec "$venv_python" -m batchrun doctor
