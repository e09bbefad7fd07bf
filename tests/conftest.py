"""Every test sees four CPU devices and float32 arithmetic; warnings are errors (pyproject.toml)."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # launch/ and configs/ are not installed

os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = os.environ.get("XLA_FLAGS", "")
if "host_platform_device_count" not in flags:
    flags += " --xla_force_host_platform_device_count=4"
if "backend_optimization_level" not in flags:
    flags += " --xla_backend_optimization_level=0"  # halves compile time, which is what these tests spend
os.environ["XLA_FLAGS"] = flags.strip()

# Tests compile the same tiny networks again and again; the second time they find them here.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "xla-tests"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
