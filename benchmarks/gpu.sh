#!/usr/bin/env bash
# Everything that needs a GPU: build in place, tests on CUDA and Triton, benchmarks, profile, compute-sanitizer.
# usage: benchmarks/gpu.sh OUT [part ...]     parts, most wanted first (default: all, so ordered):
#   build tests steps ops spectral graphs peers profile zoo sanitizer predictions
# One call ends within LIMIT seconds (default 530). A part that does not fit is stopped, and so is one that takes more
# than 2/5 of them beside others; tests then name their failures, benchmarks keep the cases they have done. Called again
# with the same OUT it does the parts that are not done yet; OUT/PART.log and small result files stay there, and
# OUT.tar.gz holds them all.
# Uses the python on PATH (PYTHON names another) and its torch; needs no network. DRY_RUN=1 rehearses every part on a
# machine without a GPU. A failed part does not stop the others.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: benchmarks/gpu.sh OUT [part ...]}
shift
parts=("$@")
all=(build tests steps ops spectral graphs peers profile zoo sanitizer predictions)
[ $# -gt 0 ] || parts=("${all[@]}")
export python=${PYTHON:-python3} dry=${DRY_RUN:-0}
limit=${LIMIT:-530}
mkdir -p "$out"
out=$(cd "$out" && pwd)
export out XLA_PYTHON_CLIENT_PREALLOCATE=false # JAX takes three quarters of the GPU's memory otherwise
failed=()

export op_tests="tests/test_interpolate.py tests/test_perturb.py tests/test_grad_penalty.py tests/test_pairwise_cost.py
  tests/test_random.py tests/test_norm_act.py tests/test_spectral_norm.py"

part_build() {
  if [ "$dry" = 1 ]; then
    "$python" setup.py --version
    return
  fi
  local archs
  archs=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || return 1
  GPKERNELS_BUILD=cuda GPKERNELS_CUDA_ARCHS=$archs MAX_JOBS=$(nproc) "$python" setup.py build_ext --inplace && return
  GPKERNELS_BUILD=cpu MAX_JOBS=$(nproc) "$python" setup.py build_ext --inplace # the CPU's and Triton are left
  return 1
}

part_tests() {
  "$python" -m gpkernels doctor || return 1
  local how=(--maxfail=20 -q -rf)
  "$python" -c 'import xdist' 2>/dev/null && how+=(-n 4 --dist loadfile)
  [ "$dry" = 1 ] && how=(--collect-only -q)
  "$python" -m pytest $op_tests tests/test_raw_ops.py tests/test_readme.py tests/test_gpu.py \
    tests/test_spectral_gpu.py tests/test_graphs.py tests/test_engine_torch.py tests/test_training_precision.py \
    -k "triton or cuda or gpu or graphed" "${how[@]}"
}

bench() {
  local how=(--device cuda)
  [ "$dry" = 1 ] && how=(--device cpu --quick)
  "$python" -m benchmarks "$@" "${how[@]}" --out "$out"
}

part_steps() { bench steps; }
part_ops() { bench ops; }
part_spectral() { bench spectral; }
part_graphs() { bench graphs; }
part_peers() { bench peers; }
part_zoo() { bench ablation matrix; }

part_profile() {
  local how=(--device cuda)
  [ "$dry" = 1 ] && how=(--device cpu --quick)
  "$python" -m benchmarks.profile "${how[@]}" --out "$out/profile.txt"
}

part_sanitizer() {
  local tool
  for tool in memcheck racecheck initcheck; do
    local command=("$python" -m pytest $op_tests -k "cuda and value" -x)
    if [ "$dry" = 1 ]; then
      echo "compute-sanitizer --tool $tool --error-exitcode 9 ${command[*]}"
      continue
    fi
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 "${command[@]}" || return 1
  done
}

part_predictions() {
  "$python" -m benchmarks.predictions $([ "$dry" = 1 ] && echo --quick) >"$out/predictions.md"
}
export -f bench "${all[@]/#/part_}"

for part in "${parts[@]}"; do
  if ! declare -F "part_$part" >/dev/null; then
    echo "part: wanted some of ${all[*]}, got $part" >&2
    exit 2
  fi
  if [ -e "$out/$part.done" ]; then
    echo "== $part was done"
    continue
  fi
  left=$((limit - SECONDS))
  if [ "$left" -le 0 ]; then
    echo "$part NOT STARTED, no time left" | tee -a "$out/summary.txt"
    failed+=("$part")
    continue
  fi
  most=$((${#parts[@]} > 1 ? limit * 2 / 5 : limit))
  echo "== $part"
  start=$SECONDS
  verdict=ok
  if timeout --signal=INT --kill-after=15 $((left < most ? left : most)) \
    env --default-signal=INT bash -c "part_$part" >"$out/$part.log" 2>&1; then
    touch "$out/$part.done"
  else
    [[ $? = 124 || $? = 137 ]] && verdict="STOPPED by the limit" || verdict=FAILED
    failed+=("$part")
  fi
  echo "$part $verdict in $((SECONDS - start)) s" | tee -a "$out/summary.txt"
  tail -n 5 "$out/$part.log"
done
tar -czf "$out.tar.gz" -C "$(dirname "$out")" "$(basename "$out")"
[ ${#failed[@]} -eq 0 ]
