# Sourced by the other scripts: a virtual environment in .venv with this repository installed.
#
#   prepare_venv            what a run needs
#   prepare_venv dev        and what the tests and the linters need (any extra of pyproject.toml)
#
#   prepare_venv dev also installs the kernels of mamba-ssm, for the tests of the GPU operators
#   install_kernels         just these, into the environment of $venv_python
#
# Sets $root (the repository) and $venv_python. A stamp of everything that decides what is in the
# environment makes every call but the first one quick. Needs bash and Python 3.11 or newer.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
venv_python="$root/.venv/bin/python"

fail() { # fail MESSAGE HINT
  printf 'error: %s\nhint: %s\n' "$1" "$2" >&2
  exit 1
}

# A name in the PATH may be a stub that only says what is missing, so each candidate is run.
find_python() {
  local candidate found=""
  if [ -n "${PYTHON:-}" ]; then
    set -- "$PYTHON"
  else
    set -- python3 python3.14 python3.13 python3.12 python3.11 python
  fi
  for candidate in "$@"; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
    found="${found:-$("$candidate" -c 'import sys; print(sys.version.split()[0])' 2>/dev/null || true)}"
  done
  fail "Python 3.11 or newer is needed; found ${found:-none} (tried: $*)" \
    "install it, or name one that is not in the PATH: PYTHON=/path/to/python3 bash scripts/demo.sh"
}

create_venv() {
  local python
  python="$(find_python)"
  "$python" -c 'import venv, ensurepip' 2>/dev/null ||
    fail "$python cannot make virtual environments: its modules venv and ensurepip are missing" \
      "on Debian or Ubuntu: apt-get install python3-venv; or name another Python with PYTHON="
  echo "Making a virtual environment in $root/.venv with $python ..." >&2
  "$python" -m venv --clear "$root/.venv"
}

# The bytes that decide what pip would install, and where. An environment that was moved with its
# repository is another one: its scripts hold absolute paths.
current_stamp() {
  "$venv_python" -I - "$root" <<'PYTHON'
import hashlib, pathlib, sys

root = pathlib.Path(sys.argv[1])
digest = hashlib.sha256(f"{root} {sys.version}".encode())
for name in ("pyproject.toml", "constraints.txt"):
    digest.update((root / name).read_bytes())
print(digest.hexdigest())
PYTHON
}

# is_installed EXTRA STAMP: an environment with any extra holds what a plain one holds.
is_installed() {
  local extra="$1"
  [ "$extra" != plain ] || extra="*"
  # shellcheck disable=SC2086  # the star is a pattern
  grep -qsx "$2" "$root"/.venv/.installed-$extra
}

# Of mamba-ssm's source archive only the kernels that are written in Triton are used, so its CUDA
# extension is skipped, and no compiler is needed. Its declared requirements beyond einops and triton
# serve other models, hence --no-deps; it imports torch while it is built, hence
# --no-build-isolation.
install_kernels() {
  MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE \
    "$venv_python" -m pip install -qq --disable-pip-version-check \
    --constraint "$root/constraints.txt" --no-build-isolation --no-deps mamba-ssm ||
    fail "pip could not install the kernels of mamba-ssm; its messages stand above" \
      "running this again goes on from here"
}

prepare_venv() {
  local extra="${1:-plain}" target="$root" stamp started=$SECONDS
  [ "$extra" = plain ] || target="$root[$extra]"
  # Two scripts started at once: the second one waits for the first one's installation.
  if command -v flock >/dev/null; then
    exec 9>"$root/.venv.lock"
    flock --nonblock 9 || {
      echo "Waiting for another script that is installing ..." >&2
      flock 9
    }
  fi
  "$venv_python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || create_venv
  stamp="$(current_stamp)"
  if ! is_installed "$extra" "$stamp"; then
    echo "Installing batchrun and what it needs into .venv (once; takes a few minutes) ..." >&2
    "$venv_python" -m pip --version >/dev/null 2>&1 || "$venv_python" -m ensurepip >/dev/null
    # -qq: errors alone.
    "$venv_python" -m pip install -qq --disable-pip-version-check \
      --constraint "$root/constraints.txt" --editable "$target" ||
      fail "pip could not install batchrun; its messages stand above" \
        "running this again goes on from here; nothing outside $root/.venv was changed"
    # Triton is made for Linux; elsewhere the tests that need it are skipped.
    if [ "$extra" = dev ] && [ "$(uname -s)" = Linux ]; then
      install_kernels
    fi
    echo "$stamp" >"$root/.venv/.installed-$extra"
    echo "Installed in $((SECONDS - started)) s." >&2
  fi
  # Ray and the tests must not inherit the lock.
  exec 9>&-
}
