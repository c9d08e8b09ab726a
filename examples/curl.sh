#!/usr/bin/env bash
# Requests with curl. Needs a running server (`make serve`): examples/curl.sh [URL]
set -euo pipefail
url=${1:-http://localhost:8000}

echo "Fields and settings of this server:"
curl --fail-with-body --silent --show-error "$url/v1/kv_compression"

# The server protects the first 4 and the last 64 tokens of a prompt: here, all of them. So the request protects fewer.
echo -e "\n\nHalf of the prompt's KV cache is kept:"
curl --fail-with-body --silent --show-error "$url/v1/completions" -H 'Content-Type: application/json' -d '{
  "prompt": "The keeper of the lighthouse wrote the direction of the wind in her book every evening, and so",
  "max_tokens": 16,
  "temperature": 0,
  "kv_keep_ratio": 0.5,
  "kv_protect_last": 4
}'

echo -e "\n\nA bad value gets 400, with the name of the field:"
curl --silent --show-error "$url/v1/completions" -H 'Content-Type: application/json' -d '{
  "prompt": "Hello",
  "kv_keep_ratio": 2
}'
echo
