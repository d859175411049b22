#!/usr/bin/env bash
# Inject every fault of the matrix into real runs and print what became of each; up to 45 minutes.
#
#   bash scripts/chaos.sh              all of them
#   bash scripts/chaos.sh -k drained   arguments go to pytest
#
# Faults of nodes start Ray clusters of several nodes on this machine; the outage of a real S3
# gateway needs Debian's radosgw, ceph-mon, ceph-osd and ceph-common, the full disk the right to
# mount, the host that is cut off the right to make network namespaces. What is missing is skipped,
# and said.
set -euo pipefail
# shellcheck source=scripts/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
prepare_venv dev

cd "$root"
export RAY_USAGE_STATS_ENABLED=0 HF_HUB_OFFLINE=1 AWS_EC2_METADATA_DISABLED=true
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
exec "$venv_python" -m pytest tests/chaos -m "chaos or not chaos" "$@"
