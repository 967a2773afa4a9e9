#!/bin/sh
# The gateway with nothing but curl: what there is, a stream, the tokens of a text, their log-probabilities.
#
#     llmasos up                              # prints the address of a gateway
#     examples/http.sh http://127.0.0.1:8000
set -eu
post() { curl -sS --fail-with-body --no-buffer "$1" -H 'Content-Type: application/json' -d "$2" && echo; }

curl -sS --fail-with-body "$1/v1/models" && echo
post "$1/v1/chat/completions" \
  '{"model": "smollm2", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 12, "stream": true}'
post "$1/tokenize" '{"prompt": "The capital of France is"}'
post "$1/v1/completions" \
  '{"model": "smollm2", "prompt": "The capital of France is Paris", "max_tokens": 0, "echo": true, "logprobs": 1}'
