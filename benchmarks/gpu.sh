#!/usr/bin/env bash
# Everything that needs a GPU: build in place, tests on CUDA, benchmarks, profile, compute-sanitizer.
# usage: benchmarks/gpu.sh OUT [part ...]     parts: build tests bench peers profile sanitizer (default: all, so ordered)
# One call ends within LIMIT seconds (default 530): a part that does not fit is stopped. Called again with the same OUT
# it does the parts that are not done yet; OUT/PART.log and small result files stay there.
# Uses the python on PATH (PYTHON names another) and its torch; needs no network. DRY_RUN=1 rehearses every part on a
# machine without a GPU. A failed part does not stop the others.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: benchmarks/gpu.sh OUT [part ...]}
shift
parts=("$@")
[ $# -gt 0 ] || parts=(build tests bench peers profile sanitizer)
export python=${PYTHON:-python3} dry=${DRY_RUN:-0}
limit=${LIMIT:-530}
mkdir -p "$out"
out=$(cd "$out" && pwd)
export out
failed=()

export op_tests="tests/test_interpolate.py tests/test_perturb.py tests/test_grad_penalty.py tests/test_pairwise_cost.py
  tests/test_random.py tests/test_norm_act.py tests/test_spectral_norm.py"

part_build() {
  if [ "$dry" = 1 ]; then
    "$python" setup.py --version
  else
    GPKERNELS_BUILD=cuda MAX_JOBS=$(nproc) "$python" setup.py build_ext --inplace
  fi
}

part_tests() {
  "$python" -m gpkernels doctor || return 1
  local how=(-x -q)
  [ "$dry" = 1 ] && how=(--collect-only -q)
  "$python" -m pytest $op_tests tests/test_raw_ops.py tests/test_readme.py tests/test_gpu.py \
    tests/test_spectral_gpu.py tests/test_graphs.py tests/test_engine_torch.py -k "triton or cuda or gpu" "${how[@]}"
}

part_bench() {
  local how=(--device cuda)
  [ "$dry" = 1 ] && how=(--device cpu --quick)
  "$python" -m benchmarks ops steps spectral "${how[@]}" --out "$out" &&
    "$python" -m benchmarks.predictions $([ "$dry" = 1 ] && echo --quick) >"$out/predictions.md"
}

part_peers() {
  local how=(--device cuda)
  [ "$dry" = 1 ] && how=(--device cpu --quick)
  "$python" -m benchmarks peers ablation matrix "${how[@]}" --out "$out"
}

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
export -f part_build part_tests part_bench part_peers part_profile part_sanitizer

for part in "${parts[@]}"; do
  if ! declare -F "part_$part" >/dev/null; then
    echo "part: wanted build, tests, bench, peers, profile or sanitizer, got $part" >&2
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
  echo "== $part"
  start=$SECONDS
  verdict=ok
  if timeout "$left" bash -c "part_$part" >"$out/$part.log" 2>&1; then
    touch "$out/$part.done"
  else
    [ $? = 124 ] && verdict="STOPPED by the limit" || verdict=FAILED
    failed+=("$part")
  fi
  echo "$part $verdict in $((SECONDS - start)) s" | tee -a "$out/summary.txt"
  tail -n 5 "$out/$part.log"
done
[ ${#failed[@]} -eq 0 ]
