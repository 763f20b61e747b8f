#!/bin/bash
# What needs a GPU, in one script: tests, step ratios, compact models, and the runs of results/.
#
#   MODEL=minilm SST2=glue/SST-2 SQUAD=squad RUNS=runs UPDATES=3000 JOBS=12 bash benchmarks/gpu.sh OUT
#
# MODEL, SST2, SQUAD, RUNS, UPDATES, SEEDS: as in results/commands.sh. JOBS: runs at a time on the GPU.
# PARTS: of `steps selection tests inference runs`, in this order, all by default. OUT: folder of logs and tables.
# DEVICE, SHAPE, SIZE: of the steps; `DEVICE=cpu SHAPE=1x8 SIZE="--layers 1 --hidden 64"` tries them without a GPU.
# INFERENCE: flags of benchmarks/compact.py that win, such as `--models A B --dense C`.
# 12 runs of a small model at a time need one core each; they are faster under NVIDIA's MPS.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${1:?the folder of the results is missing} PYTHON=${PYTHON:-python} PARTS=${PARTS:-steps selection tests inference runs}
DEVICE=${DEVICE:-cuda} SHAPE=${SHAPE:-16x384} SIZE=${SIZE:-}
mkdir -p "$OUT"
export OMP_NUM_THREADS=1

part() { # part NAME SECONDS COMMAND...
  local name=$1 seconds=$2 start=$SECONDS
  shift 2
  timeout "$seconds" "$@" > "$OUT/$name.txt" 2>&1 || echo "$name: ended with status $?"
  echo "$name: $((SECONDS - start)) s, $(tail -n 1 "$OUT/$name.txt" | cut -c 1-150)"
}

run_all() { # run_all SECONDS PARTS...: of results/commands.sh
  local seconds=$1
  shift
  bash results/commands.sh "$@" | sed "s#\bpython #$PYTHON #g" > "$OUT/commands.txt"
  part "${1}" "$seconds" xargs -a "$OUT/commands.txt" -P "${JOBS:-12}" -I{} bash -c {}
}

for name in $PARTS; do
  case $name in
    tests) part tests 300 "$PYTHON" -m pytest -q -p no:cacheprovider tests/test_gpu.py tests/test_binarizers.py \
      tests/test_masks.py tests/test_modeling.py tests/test_inference.py -k "gpu or device or compile" ;;
    steps)
      step="benchmarks/training_step.py --device $DEVICE --shapes $SHAPE $SIZE --bf16"
      part steps 150 "$PYTHON" $step --json "$OUT/steps.json"
      part steps-compiled 240 "$PYTHON" $step --no_memory --compile --json "$OUT/steps-compiled.json"
      part hours 20 "$PYTHON" -c 'import json, sys
for path in sys.argv[1:]:
    for shape, methods in json.load(open(path))["shapes"].items():
        for name, found in methods.items():
            hours = 55_000 * found["masked"]["step"] / 3600
            print(f"{path}: 55,000 updates of {shape}, {name}: {hours:.1f} hours")' "$OUT"/steps*.json ;;
    selection) part selection 60 "$PYTHON" benchmarks/selection.py --device $DEVICE $SIZE ;;
    inference) part inference 600 "$PYTHON" benchmarks/compact.py --device cuda --dtype bf16 --batches 32 128 \
      --lengths 384 --repeats 20 ${INFERENCE:-} ;;
    runs)
      run_all 600 teachers
      run_all "${LIMIT:-3000}" sst-2 squad
      part report 300 "$PYTHON" paper_tables.py report "$RUNS" --csv "$OUT/runs.csv" --markdown "$OUT/report.md" ;;
  esac
done
