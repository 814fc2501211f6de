#!/usr/bin/env bash
# Run the tests marked gpu and measure `benchmarks.speed gpu`, in under 8 minutes, without a network.
#
#     bash scripts/on_gpu.sh OUT [--rehearse]
#
# OUT gets log.txt, gpu.json (rows as they are measured) and tests.xml. --rehearse takes the CPU and
# tiny sizes, and only shows that everything runs.
set -uo pipefail
if [ $# -lt 1 ] || [ $# -gt 2 ] || { [ $# -eq 2 ] && [ "$2" != --rehearse ]; }; then
  echo "usage: bash scripts/on_gpu.sh OUT [--rehearse]" >&2
  exit 2
fi
mkdir -p "$1" || exit 1
out=$(cd "$1" && pwd)
measured=(--device cuda)
[ $# -eq 2 ] && measured=(--device cpu --scale small --repeats 1)
cd "$(dirname "$0")/.." || exit 1
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec > >(tee "$out/log.txt") 2>&1

python - "${measured[1]}" <<'PYTHON' || exit 1
import importlib.util
import sys

PARTS = {
    "everything": ("torch", "tensordict", "torchrl", "numpy", "h5py", "filelock", "rich"),
    "the speed of updates": ("tyro", "gymnasium", "joblib", "scipy"),
    "the tests": ("pytest", "pytest_timeout", "hypothesis"),
    "language": ("transformers", "accelerate", "datasets", "trl"),
}
for part, packages in PARTS.items():
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        print(f"missing: {', '.join(missing)}, for {part}", flush=True)
        if part == "everything":
            sys.exit(1)
import torch

if sys.argv[1] == "cuda" and not torch.cuda.is_available():
    sys.exit("error: torch sees no GPU; --rehearse takes the CPU")
device = torch.cuda.get_device_name() if sys.argv[1] == "cuda" else "CPU"
print(f"torch {torch.__version__} on {device}", flush=True)
PYTHON

status=0
timeout 120 python -m pytest -m gpu -p no:cacheprovider --junitxml "$out/tests.xml" \
  tests/baselines/test_stack.py tests/test_weights.py tests/language/test_reference_tokens.py \
  tests/policies/test_token_log_prob.py
tests=$?
[ $tests -eq 0 ] || { echo "tests: exit status $tests"; status=1; }
timeout 340 python -m benchmarks.speed gpu "${measured[@]}" --json "$out/gpu.json"
speed=$?
[ $speed -eq 0 ] || { echo "benchmarks.speed gpu: exit status $speed (124: out of time)"; status=1; }
exit $status
