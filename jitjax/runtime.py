"""Process set-up: environment, XLA flags, several processes, the compilation cache. Nothing here runs at import."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import multiprocessing
import os
import re
from pathlib import Path

from jitjax import distributed, leftovers

# Applied unless the user's XLA_FLAGS name the same flag.
XLA_FLAGS = {
    # Without fused kernels cuBLAS beats Triton's matmuls here by 5-8% of a step; with them it only shortens
    # compilation (measured on an H200).
    "--xla_gpu_enable_triton_gemm": "false",
    # All-to-alls inside a process by the copy engines: beside NCCL's kernels, which occupy multiprocessors, ours lose more time
    # than the transfers take (measured on two H200).
    "--xla_gpu_use_memcpy_local_p2p": "true",
    # Emulated devices on a busy machine may reach an all-reduce minutes apart; the default gives up after 40 seconds.
    "--xla_cpu_collective_call_terminate_timeout_seconds": "1200",
}
# With this on, its default, the allocator takes the beginning of the space that a step's temporary memory has just left for the
# next small array, although there is room elsewhere, and the next step finds no space in one piece. So ended seven of nine
# runs on H200, after 20 to 600 steps, whose step took more than half of their memory. Earlier versions know no such flag.
ALLOCATOR_FLAG, ALLOCATOR_SINCE = "--xla_gpu_enable_allocator_spatial_partitioning", (0, 11)
ENVIRONMENT = {
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",  # default 0.75 leaves a quarter of the card unused
    "TF_CPP_MIN_LOG_LEVEL": "1",
    "GRPC_VERBOSITY": "ERROR",
    # Where input workers are killed with the run, Python removes their shared memory, and would call that a leak.
    "PYTHONWARNINGS": "ignore:resource_tracker:UserWarning",
}
# GB of page-locked host memory that XLA may take, 64 by default. Saves and EMA snapshots need there what the state takes.
HOST_MEMORY_LIMIT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"


def is_worker() -> bool:
    """Whether this process was spawned by another Python process of ours (a Grain worker re-imports the main module)."""
    return multiprocessing.parent_process() is not None


def hide_accelerators() -> None:
    """Keep a worker process off the GPU: a single JAX call there would take hundreds of megabytes of it."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    leftovers.name_segments(os.getppid())


def xla_flags() -> dict[str, str]:
    """Our defaults for XLA, by name. An unknown one would end the process, so they depend on jaxlib's version."""
    version = tuple(map(int, re.findall(r"\d+", importlib.metadata.version("jaxlib"))[:2]))  # 0.11.0, 0.11rc1, 0.11+cuda12
    return XLA_FLAGS | ({ALLOCATOR_FLAG: "false"} if version >= ALLOCATOR_SINCE else {})


def set_environment() -> None:
    """Our defaults, before JAX starts; whatever the user has set wins."""
    mine = os.environ.get("XLA_FLAGS", "").strip()
    if mine and not mine.startswith("-"):  # a file of flags, which XLA takes for one only where it stands alone
        with contextlib.suppress(OSError):
            mine = " ".join(Path(mine).read_text().split())
    named = {flag.partition("=")[0] for flag in mine.split()}
    ours = [f"{name}={value}" for name, value in xla_flags().items() if name not in named]
    os.environ["XLA_FLAGS"] = " ".join([*ours, mine]).strip()
    for name, value in {**ENVIRONMENT, HOST_MEMORY_LIMIT: str(host_memory_limit())}.items():
        os.environ.setdefault(name, value)
    # JAX reports at every start on a machine without a TPU that there is none.
    logging.getLogger("jax._src.xla_bridge").addFilter(lambda record: "'tpu'" not in record.getMessage())


def host_memory_limit() -> int:
    """All that the machine has, in GB (a limit reserves nothing), but no less than XLA's default."""
    return max(64, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**30)


def start_distributed() -> distributed.Peers:
    """Join the other processes of a cluster run, if the environment says that there are any; see `jitjax.distributed`."""
    return distributed.start()


def use_compilation_cache(directory: str) -> Path | None:
    """Keep compiled programs between starts. "auto": the user's cache directory, on GPU; "": nowhere."""
    import jax

    if directory == "auto":
        if jax.default_backend() != "gpu" or os.environ.get("JAX_COMPILATION_CACHE_DIR"):
            return None
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        directory = str(Path(base) / "jitjax" / "compiled")
    if not directory:
        return None
    jax.config.update("jax_compilation_cache_dir", str(Path(directory).expanduser()))
    return Path(directory)
