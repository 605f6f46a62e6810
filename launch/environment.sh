# shellcheck shell=bash
# The other scripts source this file before they read their arguments. It removes --dry-run if that
# is the first argument; `run` then prints commands instead of running them.
dry_run=""
if [ "${1:-}" = "--dry-run" ]; then
  dry_run=yes
  shift
fi

# run COMMAND...: runs the command; in a dry run, prints it in a form that can be typed.
run() {
  if [ -n "$dry_run" ]; then
    printf '%q ' "$@" && echo
  else
    "$@"
  fi
}

# stop TEXT: prints an error and exits with status 2.
stop() {
  echo "error: $1" >&2
  exit 2
}

# make_environment FOLDER EXTRA: installs this project there, again only if requirements change.
make_environment() {
  local folder=$1 extra=$2 stamp
  stamp=$(cat requirements.txt pyproject.toml | cksum)
  if [ -n "$dry_run" ] || [ ! -f "$folder/installed" ] || [ "$(cat "$folder/installed")" != "$stamp" ]; then
    if [ -z "$dry_run" ]; then
      echo "installing into $folder (a minute or two, once)"
      "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "error: ${PYTHON:-python3} is older than Python 3.11; set PYTHON=/path/to/a/newer/python3" >&2
        exit 1
      }
    fi
    run "${PYTHON:-python3}" -m venv "$folder"
    run "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".$extra"
    [ -n "$dry_run" ] || echo "$stamp" > "$folder/installed"
  fi
  # Compiled programs are stored between runs, in a folder of the user.
  export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/beagle_jax/xla}"
}
