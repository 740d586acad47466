#!/usr/bin/env bash
# Every benchmark on this machine, or (--check) what must be right there, into one flat folder.
#
#   benchmarks/gpu.sh [--small] [--check] [OUT]
#
# OUT: default benchmarks/results/new. About 6 minutes; --check (`python -m tests.gpu_check`) about 4. --small: small sizes,
# on a CPU too; with --check its rehearsal on the CPU.
# SECONDS_IN_ALL: another limit. The most important comes first, and what does not fit is left out.
# WHEELS=DIR: wheels that are installed into a temporary folder first, without a network (see benchmarks/README.md).
# PYTHON: the interpreter that has torch, default python3. COMMIT: what was copied here without its git history.
#
# Each part has a time limit of its own, and one that fails does not end the others. The exit code is 0 if all passed.
set -u
cd "$(dirname "$0")/.."

small= check=
while [[ "${1:-}" == --* ]]; do
  case "$1" in
    --small) small=1 ;;
    --check) check=1 ;;
    *) echo "unknown option $1" >&2; exit 1 ;;
  esac
  shift
done
out=$(realpath -m "${1:-benchmarks/results/new}")
python=${PYTHON:-python3}
budget=${SECONDS_IN_ALL:-$((check ? 240 : small ? 175 : 350))}
mkdir -p "$out"
: >"$out/summary.txt"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

if [ -n "${WHEELS:-}" ]; then
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$scratch/site" \
    "$WHEELS"/*.whl || exit 1
  "$python" -m compileall -q -j 0 "$scratch/site" >"$out/setup.log" 2>&1  # once, not in each of many processes
  export PYTHONPATH="$scratch/site${PYTHONPATH:+:$PYTHONPATH}"
fi
# the interpreter's own programs: ninja, by which DeepSpeed compiles
PATH="$(dirname "$(command -v "$python")"):$PATH"
export PATH HF_HUB_OFFLINE=1

device=$("$python" -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")' 2>"$out/setup.log") || {
  cat "$out/setup.log"
  echo "$python has no torch: give PYTHON or WHEELS" >&2
  exit 1
}
if [ "$device" = cpu ] && [ -z "$small" ]; then
  echo "there is no GPU: give --small" >&2
  exit 1
fi
if [ -n "$check" ]; then
  "$python" -m tests.gpu_check --device "$device" --seconds "$((budget - SECONDS))" "$out"
  exit
fi

# run NAME SECONDS COMMAND...: its output in OUT/NAME.log, a line in OUT/summary.txt
run() {
  local name=$1 limit=$2 start=$SECONDS left=$((budget - SECONDS)) code
  shift 2
  if [ "$left" -lt "$limit" ]; then limit=$left; fi
  if [ "$limit" -lt 5 ]; then
    printf '%-14s FAILED  no time was left\n' "$name" >>"$out/summary.txt"
    return
  fi
  echo "== $name (at most $limit s): $*"
  timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1
  code=$?
  local took=$((SECONDS - start)) verdict="FAILED  exit code $code"
  if [ "$code" -eq 0 ]; then verdict=passed; fi
  if [ "$code" -eq 124 ] || [ "$code" -eq 137 ]; then verdict="FAILED  past its limit"; fi
  printf '%-14s %s, %d s\n' "$name" "$verdict" "$took" >>"$out/summary.txt"
  if [ "$code" -ne 0 ]; then tail -n 15 "$out/$name.log"; else tail -n 3 "$out/$name.log"; fi
}

# bench NAME SECONDS BENCHMARK OPTIONS...
bench() {
  local name=$1 limit=$2 benchmark=$3
  shift 3
  run "$name" "$limit" "$python" -m "benchmarks.$benchmark" --json "$out/$name.json" "$@"
}

if [ -n "$small" ]; then
  bench ops 40 ops --tokens 128 --width 64 --vocab 2048 --repeats 2
  bench engine 60 engine --size tiny --steps 2 --profile "$out/profile.txt"
  bench step 60 step --size tiny --repeats 2 --checkpointing off --methods ted
  bench memory 40 memory --blocks 2 --pairs 1 2 --width 64 --vocab 2048 --sequence 64
  bench data 30 data --size tiny --mib 0.5 --vocab 700 --repeats 1
  bench scaling 60 scaling --device cpu --ranks 1 2 --steps 1 --blocks 2 --width 64 --vocab 1024 --sequence 32
else
  bench engine 140 engine --size 1.5b --profile "$out/profile.txt"
  bench ops 110 ops --tokens 8192 --width 4096 --vocab 128256 --repeats 5
  bench ops-odd 50 ops --tokens 8192 --width 2048 --vocab 151665 151936 50257 --repeats 5 --gate
  bench step-1.5b 60 step --size 1.5b --checkpointing off --repeats 5
  bench memory 60 memory --pairs 2 6 12 --width 1024 --vocab 128256 --sequence 1024
  bench data 60 data --size 1.5b
fi

echo
cat "$out/summary.txt"
echo "$device, $SECONDS s, everything is in $out"
! grep -q FAILED "$out/summary.txt"
