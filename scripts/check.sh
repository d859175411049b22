#!/usr/bin/env bash
# Run the formatter (as a check), the linter and the type checker; all three, then say how it went.
#
#   bash scripts/check.sh          check
#   bash scripts/check.sh --fix    format and mend what can be mended, then check
set -euo pipefail
# shellcheck source=scripts/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
prepare_venv dev

cd "$root"
bin="$root/.venv/bin"
case "${1:-}" in
  "") ;;
  --fix)
    "$bin/ruff" check --quiet --fix . || true # what is left is reported below
    "$bin/ruff" format --quiet .
    ;;
  *) fail "unknown argument $1" "scripts/check.sh takes --fix or nothing" ;;
esac

failed=()
"$bin/ruff" format --check --diff . || failed+=("ruff format")
"$bin/ruff" check . || failed+=("ruff check")
"$bin/mypy" --strict batchrun || failed+=("mypy")

if [ "${#failed[@]}" -gt 0 ]; then
  printf 'FAILED: %s\n' "${failed[@]}"
  exit 1
fi
echo "All checks passed."
