# Sourced by the other scripts: make_environment FOLDER EXTRA installs this project there, once per requirements file.
make_environment() {
  local folder=$1 extra=$2 stamp
  stamp=$(cat requirements.txt pyproject.toml | cksum)
  if [ ! -f "$folder/installed" ] || [ "$(cat "$folder/installed")" != "$stamp" ]; then
    echo "installing into $folder (a minute or two, once)"
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
      echo "error: ${PYTHON:-python3} is older than Python 3.11; set PYTHON=/path/to/a/newer/python3" >&2
      exit 1
    }
    "${PYTHON:-python3}" -m venv "$folder"
    "$folder/bin/python" -m pip install --quiet --editable ".$extra"
    echo "$stamp" > "$folder/installed"
  fi
  # transformers notes at every start that torch is absent; here it is only a tokenizer.
  export TRANSFORMERS_NO_ADVISORY_WARNINGS=1
  # Compiled programs are kept between runs, per user.
  export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/beagle_jax/xla}"
}
