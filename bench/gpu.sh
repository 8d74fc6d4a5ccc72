#!/usr/bin/env bash
# Build, test and measure on the NVIDIA GPU at hand, offline, with the Python and packages that are there:
#   bench/gpu.sh [--list] [--tiny] [first | second | PART[:FILTER] ...]
# Two calls of at most 8 minutes each say everything, the most important first; without a name both are made:
#   first   build tests:cuda steps:llama-n4|gpt2-n32 layers flat
#   second  build sanitize steps:llama-n16 tests:cpu
# Parts: build tests steps layers flat sanitize. A filter keeps the cases that contain it: `flat:gram_solve`, `flat:QR`,
# `layers:linear_gram`, `steps:llama-n4`, `sanitize:memcheck`, `tests:cuda` and `tests:cpu` (what only a GPU can show, and
# the rest), `tests:offsets` (any other pytest -k expression).
# OUT: folder of CSV files, pictures and logs [bench/results]. LIMIT: seconds of every part [those of `share` below].
# PYTHON [python3]. COMMIT: what to call a tree without .git. --tiny: tiny sizes, also without a GPU, to try the logic.
# At most 100 lines of a part are printed; OUT/gpu_PART.log has all. Each part has at most 3 files, sanitize and tests more.
# Where one call goes: python3 -m bench.steps --device cuda --profile CASE CONTENDER, python3 -m bench.layers --profile OP
# SIZE DTYPE CONTENDER. A part that fails does not stop the others; the exit status says whether any did.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
PARTS=(build tests steps layers flat sanitize)
FIRST=(build tests:cuda "steps:llama-n4|gpt2-n32" layers flat)
SECOND=(build sanitize steps:llama-n16 tests:cpu)
declare -A share=([build]=60 [tests]=100 [steps]=160 [layers]=70 [flat]=90 [sanitize]=240) # seconds; `first` sums to 480
PYTHON=${PYTHON:-python3} LIMIT=${LIMIT:-} OUT=${OUT:-bench/results}
tiny=()
chosen=()
for argument in "$@"; do
  case $argument in
  --list)
    printf '%s\n' "${PARTS[@]}"
    exit 0
    ;;
  --tiny) tiny=(--tiny) ;;
  first) chosen+=("${FIRST[@]}") ;;
  second) chosen+=("${SECOND[@]}") ;;
  *)
    if [[ " ${PARTS[*]} " != *" ${argument%%:*} "* ]]; then
      echo "no part ${argument%%:*}; there are: ${PARTS[*]}" >&2
      exit 2
    fi
    chosen+=("$argument")
    ;;
  esac
done
[[ ${#chosen[@]} -gt 0 ]] || chosen=("${FIRST[@]}" "${SECOND[@]:1}")
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit 2
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export OMP_WAIT_POLICY=passive HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false TRANSFORMERS_VERBOSITY=error
[[ ${#tiny[@]} -gt 0 ]] || unset TRITON_INTERPRET

part_build() {
  local arch
  arch=$("$PYTHON" -m bench.machine --arch) || return 1
  [[ -z $arch ]] || export TORCH_CUDA_ARCH_LIST=$arch
  echo "TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-}"
  "$PYTHON" setup.py build_ext --inplace || return 1
  "$PYTHON" -c '
import shutil, sys, torch, projgrad._C as built
print(built.build_info())
lost = torch.cuda.is_available() and shutil.which("nvcc") and not built.build_info()["cuda"]
sys.exit("nvcc is there, but the CUDA kernels were not built: see above" if lost else 0)'
}

run_tests() { # name, then arguments of pytest; status 5, no test chosen, is none
  local name=$1 status
  shift
  "$PYTHON" -m pytest -p no:cacheprovider -v -ra --tb=short "${workers[@]}" "$@" >"$OUT/gpu_tests_$name.log" 2>&1
  status=$?
  grep -E '^(FAILED|ERROR) ' "$OUT/gpu_tests_$name.log" | cut -c1-200 | head -60
  tail -n 1 "$OUT/gpu_tests_$name.log"
  [[ $status -eq 5 ]] || return $status
}

part_tests() {
  local workers=()
  export CUBLAS_WORKSPACE_CONFIG=:4096:8 OMP_NUM_THREADS=2 # the first: deterministic on every stream
  if "$PYTHON" -c 'import xdist' 2>/dev/null; then
    workers=(-n "$(($(nproc) > 16 ? 8 : ($(nproc) + 1) / 2))")
  fi
  # Ahead-of-time compilation needs no GPU: `make test` has it.
  local files=(tests --ignore=tests/kernels/test_kernels_compile.py)
  [[ ${#tiny[@]} -eq 0 ]] || files=(tests/kernels/test_cuda.py)
  case $1 in
  # On a pretend GPU: what says cuda and needs none.
  cuda) run_tests cuda "${files[@]}" -k "cuda and not pretend and not linear_cuda" ;;
  cpu) run_tests cpu "${files[@]}" -k "not cuda or pretend or linear_cuda" ;;
  "") run_tests all "${files[@]}" ;;
  *) run_tests some "${files[@]}" -k "$1" ;;
  esac
}

part_sanitize() {
  if [[ ${#tiny[@]} -gt 0 ]]; then
    "$PYTHON" -m bench.sanitize --calls | tail -n 1 || return 1
  fi
  "$PYTHON" -m bench.sanitize --out "$OUT" --seconds $((LIMIT - 10)) ${1:+--tools "$1"}
}

benchmark() { # flat, layers or steps, and a filter
  "$PYTHON" -m "bench.$1" --device cuda --out "$OUT" --seconds "$before" "${tiny[@]}" --only "$2"
}
part_flat() { benchmark flat "$1"; }
part_layers() { benchmark layers "$1"; }
part_steps() { benchmark steps "$1"; }

"$PYTHON" -m bench.machine || [[ ${#tiny[@]} -gt 0 ]] || exit 2
export -f part_build part_tests run_tests part_sanitize benchmark part_flat part_layers part_steps
export PYTHON OUT
limit=$LIMIT
if [[ " ${chosen[*]}" != *" build"* ]] && ! compgen -G "projgrad/_C*.so" >/dev/null; then
  echo "the extension is not built: without the part build first, what follows runs without it"
fi
failed=()
for entry in "${chosen[@]}"; do
  part=${entry%%:*} filter=
  [[ $entry != *:* ]] || filter=${entry#*:}
  export LIMIT=${limit:-${share[$part]}}
  export before=$((LIMIT > 120 ? LIMIT - 60 : LIMIT / 2)) # seconds after which nothing new is begun
  echo "== $entry: starts $(date '+%F %T')"
  started=$SECONDS
  # Arrays are not exported: --tiny is handed over as the first argument.
  timeout -k 15 "$LIMIT" bash -c 'set -uo pipefail; tiny=($1); "part_$2" "$3"' _ "${tiny[*]}" "$part" "$filter" \
    >"$OUT/gpu_$part.log" 2>&1
  status=$?
  # The first 50 lines and the last 40: with what follows no part prints more than 100.
  awk '{ if (NR <= 50) print; else last[NR % 40] = $0 }
    END { if (NR > 90) print "... " NR - 90 " more lines in the log"
          for (k = (NR > 90 ? NR - 39 : 51); k <= NR; ++k) print last[k % 40] }' "$OUT/gpu_$part.log"
  if [[ $status -eq 124 || $status -eq 137 ]]; then
    echo "== $entry: stopped after its limit of $LIMIT s"
    [[ $part != tests ]] || grep -hE ' (FAILED|ERROR) | (FAILED|ERROR)$' "$OUT"/gpu_tests_*.log | cut -c1-200 | head -60
  fi
  csv=$OUT/gpu_$part${tiny:+_tiny}.csv
  [[ ! -e $csv ]] || timeout 60 "$PYTHON" -m bench.report "$csv"
  echo "== $entry: ends $(date '+%F %T') after $((SECONDS - started)) s with status $status"
  [[ $status -eq 0 ]] || failed+=("$entry")
done
if [[ $OUT == "$PWD/bench/results" && ${#tiny[@]} -eq 0 ]]; then
  "$PYTHON" -m bench.readme && echo "docs/gpu.md and README.md hold the new numbers"
fi
if [[ ${#failed[@]} -gt 0 ]]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
echo "all parts passed: ${chosen[*]}"
