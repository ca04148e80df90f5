#!/bin/bash
# One process a card on this host:  docs/launch/one_process_per_card.sh --config configs/h200.py --workdir runs/a
set -u
cards=${CARDS:-$(nvidia-smi --list-gpus | wc -l)}
export JAX_COORDINATOR_ADDRESS=127.0.0.1:${PORT:-12345} JAX_NUM_PROCESSES=$cards
children=()
for ((rank = 0; rank < cards; rank++)); do
  JAX_PROCESS_ID=$rank CUDA_VISIBLE_DEVICES=$rank python -m jitjax.main "$@" &
  children+=($!)
done
# A signal to this script goes to every process; each saves and ends.
trap 'kill -TERM "${children[@]}" 2>/dev/null' TERM INT HUP USR1
code=0
for child in "${children[@]}"; do
  while kill -0 "$child" 2>/dev/null; do wait "$child"; done  # `wait` also returns when a signal arrives
  wait "$child" || code=$?
done
exit "$code"
