#!/usr/bin/env bash
# Install batchrun with what its tests need into .venv (the first time) and run all tests.
#
#   bash scripts/test.sh                        everything, from any folder
#   bash scripts/test.sh tests/unit -k jobfile  arguments go to pytest
set -euo pipefail
# shellcheck source=scripts/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
prepare_venv dev

cd "$root"
# No usage reports, no model hub, no cloud metadata service; one thread a process, because the
# tests start several processes on few cores.
export RAY_USAGE_STATS_ENABLED=0 HF_HUB_OFFLINE=1 AWS_EC2_METADATA_DISABLED=true
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
exec "$venv_python" -m pytest "$@"
