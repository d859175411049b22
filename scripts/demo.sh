#!/usr/bin/env bash
# Install batchrun into .venv (the first time), answer jobs/data/questions.parquet with the model
# that ships with the package, and show some of the answers.
#
#   bash scripts/demo.sh                                          from any folder
#   bash scripts/demo.sh --set generation.max_thinking_tokens=16  arguments go to batchrun submit
set -euo pipefail
# shellcheck source=scripts/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
prepare_venv

cd "$root"
export RAY_USAGE_STATS_ENABLED=0 HF_HUB_OFFLINE=1
batchrun="$root/.venv/bin/batchrun"

# What an earlier demonstration finished is generated anew; what one left unfinished is resumed.
if [ -e out/demo/_SUCCESS ]; then
  "$batchrun" discard out/demo --yes
fi
"$batchrun" submit jobs/demo.yaml "$@"
"$venv_python" scripts/show_answers.py out/demo
