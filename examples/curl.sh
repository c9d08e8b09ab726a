#!/usr/bin/env bash
# The same with curl, against a running server (`make serve`).
set -euo pipefail
url=${1:-http://localhost:8000}

echo "What this server takes:"
curl --fail-with-body --silent --show-error "$url/v1/kv_compression"

echo -e "\n\nHalf of the prompt's KV cache is kept:"
curl --fail-with-body --silent --show-error "$url/v1/completions" -H 'Content-Type: application/json' -d '{
  "prompt": "The three primary colours are",
  "max_tokens": 16,
  "kv_keep_ratio": 0.5
}'

echo -e "\n\nA bad value is refused by name (400):"
curl --silent --show-error "$url/v1/completions" -H 'Content-Type: application/json' -d '{
  "prompt": "Hello",
  "kv_keep_ratio": 2
}'
echo
