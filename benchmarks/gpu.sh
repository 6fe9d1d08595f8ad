#!/usr/bin/env bash
# Everything that needs a GPU, in one call: build in place, tests on CUDA, compute-sanitizer, benchmarks.
# usage: benchmarks/gpu.sh OUT [part ...]     parts: build tests sanitizer bench (default: all, in this order)
# Uses the python on PATH (PYTHON names another) and its torch; needs no network. Each part leaves its log in OUT, and
# DRY_RUN=1 rehearses every part on a machine without a GPU. A failed part does not stop the others.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: benchmarks/gpu.sh OUT [part ...]}
shift
parts=("$@")
[ $# -gt 0 ] || parts=(build tests sanitizer bench)
python=${PYTHON:-python3}
dry=${DRY_RUN:-0}
mkdir -p "$out"
failed=()

op_tests=(tests/test_interpolate.py tests/test_perturb.py tests/test_grad_penalty.py tests/test_pairwise_cost.py
  tests/test_random.py tests/test_norm_act.py tests/test_spectral_norm.py)

part_build() {
  if [ "$dry" = 1 ]; then
    "$python" setup.py --version
  else
    GPKERNELS_BUILD=cuda MAX_JOBS=$(nproc) "$python" setup.py build_ext --inplace
  fi
}

part_tests() {
  "$python" -m gpkernels doctor
  local which="triton or cuda"
  [ "$dry" = 1 ] && which="cpu and value"
  "$python" -m pytest "${op_tests[@]}" tests/test_raw_ops.py tests/test_readme.py tests/test_gpu.py \
    tests/test_spectral_gpu.py tests/test_engine_torch.py -k "$which or gpu" -x
}

part_sanitizer() {
  local tool
  for tool in memcheck racecheck initcheck; do
    local command=("$python" -m pytest "${op_tests[@]}" -k "cuda and value" -x)
    if [ "$dry" = 1 ]; then
      echo "compute-sanitizer --tool $tool --error-exitcode 9 ${command[*]}"
      continue
    fi
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 240 compute-sanitizer --tool "$tool" --error-exitcode 9 "${command[@]}" ||
      return 1
  done
}

part_bench() {
  local name
  name=$("$python" -c 'import datetime, torch; print(datetime.date.today(), torch.cuda.get_device_name().replace(" ", "-")
    if torch.cuda.is_available() else "cpu", sep="-")')
  local how=(--device cuda)
  [ "$dry" = 1 ] && how=(--quick)
  "$python" -m benchmarks.ops "${how[@]}" --out "$out/$name.csv" &&
    "$python" -m benchmarks.roofline "$out/$name.csv" --out "$out/$name.png" &&
    "$python" -m benchmarks.predictions $([ "$dry" = 1 ] && echo --quick) >"$out/predictions.md" &&
    "$python" -m benchmarks.steps "${how[@]}" --out "$out/$name-steps.csv" &&
    "$python" -m benchmarks.spectral "${how[@]}" --out "$out/$name-spectral.csv"
}

for part in "${parts[@]}"; do
  echo "== $part"
  start=$SECONDS
  verdict=ok
  "part_$part" >"$out/$part.log" 2>&1 || { verdict=FAILED; failed+=("$part"); }
  echo "$part $verdict in $((SECONDS - start)) s" | tee -a "$out/summary.txt"
  tail -n 5 "$out/$part.log"
done
[ ${#failed[@]} -eq 0 ]
