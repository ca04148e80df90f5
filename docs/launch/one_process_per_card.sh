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
trap 'kill -TERM "${children[@]}" 2>/dev/null' TERM INT HUP USR1 USR2 XCPU
# When one has ended the others have 90 s: they notice a dead or hung one within about 30 s, save or end by themselves. What then
# still hangs is killed.
left=90
while running=($(jobs -pr)) && ((${#running[@]} > 0)); do
  sleep 1
  if ((${#running[@]} < cards && --left < 0)); then kill -KILL "${running[@]}" 2>/dev/null; fi
done
code=0 # the greatest of all
for child in "${children[@]}"; do
  wait "$child"
  ended=$?
  if ((ended > code)); then code=$ended; fi
done
exit "$code"
