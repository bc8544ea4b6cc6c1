#!/bin/sh
# What a GPU should be asked, on one rented GPU, from the root of the repository:
#   sh tests/bench/gpu.sh OUT [PIECE ...]
# Prints RESULT lines and keeps them in OUT/results.txt, with the whole output of each piece in OUT/PIECE.log. A piece that
# fails, or runs past its limit, is one RESULT line, and the next begins. README.md beside this file says what the pieces are;
# without a name: kernels, update, shape_7b and smollm2, in at most 9 minutes.
#
# From the environment: PYTHON (python3); PYTHONPATH (for libraries unpacked beside the machine's own); WORK (a folder on a
# fast disk with 30 GB, default /dev/shm); SMOLLM2 (the folder of a `make smollm2` run, default runs/smollm2); SECONDS_IN_ALL
# (490); SLOWER (1), a factor of all limits, a whole number; TINY=1 for the smallest shapes, on a CPU.
# Exit code: 1 if a piece failed, 2 if a word is wrong.
set -u
PIECES="kernels update trl quantized small_bfloat16 small_float32 smollm2 shape_7b shape_7b_warm shape_7b_eager \
shape_7b_keep sampling shape_7b_copies card_24gb card_8gb"
[ $# -gt 0 ] || { sed -n '2,6s/^# //p' "$0"; exit 2; }
OUT=$1
shift
for wanted in "$@"; do
    case " $PIECES " in
    *" $wanted "*) ;;
    *) echo "no piece is called $wanted; there are $PIECES" >&2; exit 2 ;;
    esac
done
case ${SLOWER:-1} in
*[!0-9]* | 0*) echo "SLOWER=$SLOWER: give a whole number of at least 1" >&2; exit 2 ;;
esac
PYTHON="${PYTHON:-python3}"
SMOLLM2="${SMOLLM2:-runs/smollm2}"
WORK="${WORK:-/dev/shm}/cellpuzzles-gpu"
export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$PWD" HF_HUB_OFFLINE=1 VLLM_USE_FLASHINFER_SAMPLER=0 PYTHONUNBUFFERED=1
SMALL="${TINY:+--small}" SHAPE="${TINY:+--tiny}"
END=$(($(date +%s) + ${SECONDS_IN_ALL:-490}))
FAILED=0
mkdir -p "$OUT" "$WORK" || exit 1

result() { echo "RESULT $*" | tee -a "$OUT/results.txt"; }

# piece NAME LIMIT COMMAND ...: run it for at most LIMIT seconds, and not beyond the end of all
piece() {
    name=$1 limit=$(($2 * ${SLOWER:-1}))
    shift 2
    left=$((END - $(date +%s)))
    if [ $((3 * left)) -lt $((2 * limit)) ]; then # it would be cut before it has a figure
        result "${name}_skipped no time left"
        return
    fi
    [ "$left" -lt "$limit" ] && limit=$left
    start=$(date +%s)
    # at TERM a run of GRPO finishes its step, and its figures are printed; so it gets 40 s before KILL
    timeout -k 40 "$limit" "$@" >"$OUT/$name.log" 2>&1
    code=$?
    grep "^RESULT " "$OUT/$name.log" | tee -a "$OUT/results.txt"
    if [ $code -ne 0 ]; then
        FAILED=1
        result "${name}_failed exit $code after $(($(date +%s) - start)) s: $(grep -v '^RESULT ' "$OUT/$name.log" | tail -n 1)"
    fi
    result "${name}_wall_s $(($(date +%s) - start))"
}

# run NAME LIMIT MODEL ...: a GRPO run
run() {
    name=$1 limit=$2 model=$3
    shift 3
    # shellcheck disable=SC2086
    piece "$name" "$limit" "$PYTHON" -m tests.bench.gpu_run "$model" $SHAPE --name "$name" --out "$OUT" --work "$WORK" "$@"
    rm -rf "$WORK/run-$name" # its checkpoint has 8 GB at r = 256; what is wanted of the run is in OUT
}

smollm2() {
    if [ ! -f "$SMOLLM2/sft/model/config.json" ] || [ ! -f launch/recipes/smollm2_grpo.yaml ]; then
        result "smollm2_skipped no cold start in $SMOLLM2 (make smollm2 makes one)"
        return
    fi
    puzzles="$SMOLLM2/train_both.parquet"
    steps=10
    [ -z "${TINY:-}" ] || steps=1
    run smollm2 180 "$SMOLLM2/sft/model" -- --recipe smollm2_grpo --puzzles "$puzzles" --steps $steps
}

SAMPLING=""
[ -n "${TINY:-}" ] || SAMPLING="--model 40M --dtype bfloat16 --tokens 256"
EIGHT_BITS=adamw8bit  # as the recipe; where bitsandbytes is
"$PYTHON" -c "import bitsandbytes" 2>/dev/null || EIGHT_BITS=adamw
CARD="--lora-rank 16 --lora-alpha 32 --micro-tokens 8192 --memory-fraction"
[ $# -gt 0 ] || set -- kernels update shape_7b smollm2
# shellcheck disable=SC2086
for wanted in "$@"; do
    case $wanted in
    kernels) piece kernels 70 "$PYTHON" -m tests.bench.kernels $SMALL attention head lora around checksums policy ;;
    # one update with and without each kernel, flash-attn and checkpointing; and TRL's, with what of it is installed
    update) piece update 110 "$PYTHON" -m tests.bench.gpu_update --work "$WORK" ${TINY:+--tiny} --profile ;;
    trl) piece trl 280 "$PYTHON" -m tests.bench.gpu_update --work "$WORK" ${TINY:+--tiny} --trl ;;
    quantized) piece quantized 80 "$PYTHON" -m tests.bench.kernels $SMALL quantized ;;
    small_bfloat16) run small_bfloat16 110 small --dtype bfloat16 ;;
    # vLLM's kernels for adapters have no float32: the sampler adds the adapter to its own weights
    small_float32) run small_float32 90 small --dtype float32 -- --eager --sampler-lora merged ;;
    smollm2) smollm2 ;;
    # three steps; then one with the compile cache of the first, and one without compiling
    shape_7b) run shape_7b 210 qwen2.5-7b --dtype bfloat16 ;;
    shape_7b_warm) run shape_7b_warm 140 qwen2.5-7b --dtype bfloat16 -- --steps 1 ;;
    shape_7b_eager) run shape_7b_eager 120 qwen2.5-7b --dtype bfloat16 -- --steps 1 --eager ;;
    # --checkpointing without a second forward pass of attention: the same metrics, 3 GB more, a shorter update
    shape_7b_keep) run shape_7b_keep 240 qwen2.5-7b --dtype bfloat16 -- --keep-attention ;;
    sampling) piece sampling 140 "$PYTHON" -m tests.bench.sampling --repeats 3 --json "$OUT/sampling.json" $SAMPLING ;;
    # the base in memory twice, as before --base shared: the same metrics, more memory, slower sleep and wake
    shape_7b_copies) run shape_7b_copies 240 qwen2.5-7b --dtype bfloat16 -- --base copies ;;
    # what the recipe one_gpu_24gb does, on a card with so many GiB; the table is to be right within 10 %
    card_24gb) run card_24gb 240 qwen2.5-7b --dtype bfloat16 --long --limit-gib 22.5 -- $CARD 0.86 --optimizer "$EIGHT_BITS" ;;
    card_8gb) run card_8gb 160 qwen2.5-1.5b --dtype bfloat16 --limit-gib 7.6 -- $CARD 0.6 ;;
    esac
done
rm -rf "$WORK"
exit $FAILED
