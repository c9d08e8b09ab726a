#!/usr/bin/env bash
# The same with curl. With a server running (`make serve`): examples/curl.sh [URL]
set -euo pipefail
url=${1:-http://localhost:8000}

echo "What this server takes:"
curl --fail-with-body --silent --show-error "$url/v1/kv_compression"

# The server protects the 4 first and the 64 last tokens of a prompt, of this one all; so the request says otherwise.
echo -e "\n\nHalf of the prompt's KV cache is kept:"
curl --fail-with-body --silent --show-error "$url/v1/completions" -H 'Content-Type: application/json' -d '{
  "prompt": "The keeper of the lighthouse wrote the direction of the wind in her book every evening, and so",
  "max_tokens": 16,
  "temperature": 0,
  "kv_keep_ratio": 0.5,
  "kv_protect_last": 4
}'

echo -e "\n\nA bad value is refused by name (400):"
curl --silent --show-error "$url/v1/completions" -H 'Content-Type: application/json' -d '{
  "prompt": "Hello",
  "kv_keep_ratio": 2
}'
echo
