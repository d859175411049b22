#!/usr/bin/env bash
# The checks of deploy/ that the test suite leaves out: real cron (two ticks, some minutes), and the
# schemas of Kubernetes. As root on Debian it installs cron and Prometheus where they are missing.
#
#   bash scripts/ops_check.sh               arguments go to pytest
set -euo pipefail
# shellcheck source=scripts/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
prepare_venv dev
prepare_venv ops

missing=()
PATH="$PATH:/usr/sbin" command -v cron >/dev/null || missing+=(cron)
command -v promtool >/dev/null || missing+=(prometheus)
if [ "${#missing[@]}" -gt 0 ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null ||
    echo "could not install ${missing[*]}; their tests are skipped" >&2
fi

cd "$root"
export RAY_USAGE_STATS_ENABLED=0 HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 BATCHRUN_SLOW_TESTS=1
exec "$venv_python" -m pytest tests/unit/test_deploy.py tests/unit/test_manifest.py \
  tests/integration/test_deploy_cron.py tests/integration/test_deploy_prometheus.py "$@"
