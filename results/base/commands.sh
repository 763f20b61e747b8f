#!/bin/bash
# Prints the commands of the runs of an encoder of base size, one per line, in the order in which they need each other.
#
#   export MODEL=all-mpnet-base-v2 SST2=glue/SST-2 RUNS=runs
#   bash results/base/commands.sh | OMP_NUM_THREADS=1 xargs -I{} bash -c {}    # 20 to 30 minutes each, on a core by itself
#
# MODEL: a folder of all-mpnet-base-v2 (MPNet, 12 layers of 768).
set -eu
: "${MODEL:?}" "${SST2:?}" "${RUNS:?}"
COMMON="--task_name sst-2 --data_dir $SST2 --max_seq_length 64 --do_train --do_eval --do_lower_case --cache_dir $RUNS/cache \
--evaluate_during_training --logging_steps 250 --save_steps 500 --save_total_limit 1 --per_gpu_eval_batch_size 128 \
--per_gpu_train_batch_size 16 --no_cuda --bf16"
TEACHER="--teacher_type dense --teacher_name_or_path $RUNS/dense --alpha_ce 0.1 --alpha_distil 0.9"
RECIPE="--pruning_method platon --importance_beta 0.99 --uncertainty_beta 0.99 --global_topk --global_topk_frequency_compute 5"

run() { # run NAME FLAGS...
  local name=$1
  shift
  echo "python masked_run_glue.py $COMMON --output_dir $RUNS/$name $*"
}

pruned() { # pruned NAME FLAGS...: from the dense model, which is also the teacher
  local name=$1
  shift
  run "$name" --model_type masked --model_name_or_path "$RUNS/dense" "$TEACHER" --max_steps 1500 --warmup_steps 150 \
    --final_warmup 4 --learning_rate 1e-4 "$@"
}

run dense --model_type dense --model_name_or_path "$MODEL" --max_steps 1200 --warmup_steps 120 --learning_rate 3e-5
pruned recipe-10 "$RECIPE" --final_threshold 0.1
pruned recipe-10-3000 "$RECIPE" --final_threshold 0.1 --max_steps 3000 --warmup_steps 300
pruned recipe-3 "$RECIPE" --final_threshold 0.03
pruned magnitude-10 --pruning_method magnitude --final_threshold 0.1
pruned magnitude-3 --pruning_method magnitude --final_threshold 0.03
pruned soft-10 --pruning_method sigmoied_threshold --initial_threshold 0 --final_threshold 0.1 --regularization l1 \
  --mask_scores_learning_rate 3e-2 --target_remaining 0.1
pruned structure-30 "$RECIPE" --granularity structure --final_threshold 0.3
echo "python bertarize.py --model_name_or_path $RUNS/structure-30 --compact --target_model_path $RUNS/structure-30-compact"
run structure-30-second --model_type dense --model_name_or_path "$RUNS/structure-30-compact" "$TEACHER" --max_steps 1000 \
  --warmup_steps 100 --learning_rate 5e-5
echo "python bertarize.py --model_name_or_path $RUNS/structure-30-compact --onnx $RUNS/structure-30.onnx --int8"
echo "python masked_run_glue.py --task_name sst-2 --data_dir $SST2 --max_seq_length 64 --do_eval --do_lower_case --no_cuda \
--model_type dense --model_name_or_path $RUNS/structure-30-compact --onnx_file $RUNS/structure-30_int8.onnx --output_dir $RUNS/structure-30-int8"
