#!/usr/bin/env bash
# One document, compressed once, and two questions about it. Needs a running server (`make serve`):
# examples/documents.sh [URL]
set -euo pipefail
url=${1:-http://localhost:8000}
document=$(printf 'The keeper climbed the one hundred and sixty-eight steps at sunset. %.0s' $(seq 60))

# The first message is the document. A request with the same document and kv_ fields finds its compressed rows.
ask() {
  curl --fail-with-body --silent --show-error "$url/v1/chat/completions" -H 'Content-Type: application/json' -d '{
    "messages": [{"role": "system", "content": "'"$document"'"}, {"role": "user", "content": "'"$1"'"}],
    "max_tokens": 16,
    "temperature": 0,
    "kv_keep_ratio": 0.25,
    "kv_prefix_messages": 1
  }'
}

echo "The first question compresses the document (a request with max_tokens 1 would do too):"
ask "What did the keeper climb?"
echo -e "\n\nThe second question finds it; see found_tokens in usage.kv_cache:"
ask "When did the keeper climb?"
echo
