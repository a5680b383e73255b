# Sourced by the other scripts: makes .venv with rt and the extras named in $1, at the versions of
# constraints.txt, and puts it first on PATH. Does nothing the second time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "error: $("$python" --version) is too old; rt needs Python 3.10: PYTHON=/path/to/python3 $0" >&2
    exit 4
}
wanted="$1 $(cat pyproject.toml constraints.txt | cksum)"
if [ "$(cat .venv/rt-wanted 2>/dev/null)" != "$wanted" ]; then
    [ -x .venv/bin/pip ] || "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check \
        --constraint constraints.txt --editable ".[$1]" >&2
    echo "$wanted" > .venv/rt-wanted
fi
export PATH="$PWD/.venv/bin:$PATH"
