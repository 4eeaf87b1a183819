#!/usr/bin/env bash
# Runs Locust with this folder's locustfile.py and the arguments given. The first time it installs Locust, into a virtual
# environment in the user's cache.
set -euo pipefail

version=2.34.0
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
environment=${XDG_CACHE_HOME:-$HOME/.cache}/isobar/locust-$version

if [[ ! -x $environment/bin/locust ]]; then
  command -v python3 > /dev/null || { echo "Locust needs python3, 3.10 or newer, with venv" >&2; exit 2; }
  echo "installing Locust $version" >&2
  rm -rf "$environment" "$environment.unfinished"
  python3 -m venv "$environment.unfinished"
  "$environment.unfinished/bin/pip" install --quiet --disable-pip-version-check "locust==$version" >&2
  mv "$environment.unfinished" "$environment"
fi
exec "$environment/bin/python" -m locust -f "$here/locustfile.py" "$@"
