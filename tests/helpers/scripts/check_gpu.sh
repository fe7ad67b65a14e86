#!/usr/bin/env bash
# All that a machine with one GPU is asked, in ten minutes: the tests marked gpu (waits for the device, CUDA graphs, kernels), the
# benchmark at 32 768 tokens in bfloat16, offloading, a step under DDP and one under FSDP2. Each part has a limit of its own; one
# that fails leaves the others to run, and its log says why.
#
# bash tests/helpers/scripts/check_gpu.sh runs/gpu
# DEVICE=cpu bash tests/helpers/scripts/check_gpu.sh runs/gpu-toy    # the same at toy size, to try the script itself
set -uo pipefail
output=${1:?the folder of logs and results}
device=${DEVICE:-cuda}
python=${PYTHON:-python}
mkdir -p "$output"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
failed=()

part() { # NAME SECONDS COMMAND...
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    if timeout "$limit" "$@" >"$output/$name.log" 2>&1; then local verdict=passed; else
        local verdict="failed ($?)"
        failed+=("$name")
    fi
    echo "$name: $verdict, $((SECONDS - start)) s, $output/$name.log"
}

if [ "$device" = cuda ]; then
    layer=(--tokens 4096 32768 --experts 8 32 512 --sublayers 1 3 --hidden_size 1024 --intermediate_size 4096)
    model=(--model_preset configuration/models/compare-h200.json --prompt_length 256 --new_tokens 32 --batch_size 32
        --compile true)
    offloading=(--model_preset configuration/models/compare-h200.json --dtype bfloat16 --rounds 2)
    use_cpu=false wrapped=()
else
    layer=(--tokens 256 --experts 4 --sublayers 1 --hidden_size 32 --intermediate_size 64)
    model=(--config_overrides '{"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}' --prompt_length 8 --new_tokens 4 --batch_size 1)
    offloading=(--config_overrides '{"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_experts": 4, "router_type": "hash"}' --rounds 1 --steps 4)
    # accelerate keeps FSDP2 from CPUs.
    use_cpu=true wrapped=(tests/helpers/scripts/as_on_gpus.py)
fi
measure=("$python" scripts/benchmark.py --device "$device" --dtypes bfloat16 --seconds_per_cell 4 --rounds 3)
train=(scripts/run_clm.py configuration/recipes/embedded-cpu.yaml --max_steps 6 --stage1_steps 3 --eval_steps 3 --save_steps 3)
train+=(--max_train_documents 40 --max_validation_documents 2 --disable_tqdm true)
launch=("$python" -m accelerate.commands.launch --num_processes 1)

part tests 200 "$python" -m pytest -q -m gpu --no-header -p no:cacheprovider tests
part layer 130 "${measure[@]}" --parts layer "${layer[@]}" --output_dir "$output/layer" --overwrite
part generation 120 "${measure[@]}" --parts generation step --generation_batches 1 8 --backends grouped_mm \
    "${model[@]}" --output_dir "$output/generation" --overwrite
part offloading 60 "$python" scripts/measure_offloading.py --device "$device" "${offloading[@]}" --output_dir "$output/offloading"
part ddp 45 "${launch[@]}" --config_file configuration/accelerate/ddp.yaml "${train[@]}" --use_cpu "$use_cpu" \
    --output_dir "$output/ddp" --overwrite_output_dir
part fsdp2 45 "${launch[@]}" --config_file configuration/accelerate/fsdp2.yaml "${wrapped[@]}" "${train[@]}" --use_cpu false \
    --output_dir "$output/fsdp2" --overwrite_output_dir

cat "$output"/layer/*.md "$output"/generation/*.md "$output"/offloading/*.md 2>/dev/null
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}" && exit 1; }
