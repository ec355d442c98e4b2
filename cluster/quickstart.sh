#!/usr/bin/env bash
# From a bare clone to a served student measured against its LLM. Arguments are overrides.
set -euo pipefail
cd "$(dirname "$0")/.."
bash cluster/setup.sh
exec .venv/bin/python jobs/run.py jobs/configs/quickstart.toml "$@"
