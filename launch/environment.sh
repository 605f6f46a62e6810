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

# on_each_half COMMAND...: runs the command as the two processes of one run, each on half of the
# cores, which write text faster than one on all of them. One process where cores cannot be chosen.
on_each_half() {
  local both port first second
  local -a halves
  if ! command -v taskset > /dev/null || [ "$(nproc)" -lt 2 ]; then
    run "$@"
    return
  fi
  both=$("${PYTHON:-python3}" -c 'if True:
    import os, socket
    cores = sorted(os.sched_getaffinity(0))
    half = len(cores) // 2
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        print(listener.getsockname()[1], *(",".join(map(str, part)) for part in (cores[:half], cores[half:])))')
  read -r port first second <<< "$both"
  halves=(env "JAX_COORDINATOR_ADDRESS=localhost:$port" JAX_NUM_PROCESSES=2)
  if [ -n "$dry_run" ]; then
    echo "$(run "${halves[@]}" JAX_PROCESS_ID=1 taskset -c "$second" "$@")&"
    run "${halves[@]}" JAX_PROCESS_ID=0 taskset -c "$first" "$@"
    return
  fi
  "${halves[@]}" JAX_PROCESS_ID=1 taskset -c "$second" "$@" &
  # shellcheck disable=SC2064  # the process that runs now
  trap "kill $! 2> /dev/null || true" EXIT
  "${halves[@]}" JAX_PROCESS_ID=0 taskset -c "$first" "$@"
  wait $!
  trap - EXIT
}
