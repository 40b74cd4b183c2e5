"""One of the two processes of `benchmarks/publish.py` that are one `jax.distributed` job.

    python benchmarks/publish_cross_host.py RANK OWN_ADDRESS JOB_ADDRESS BYTES REPEATS

Process 0 holds as many bytes, process 1 gets them; it prints the least seconds of one copy.
"""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from magistral_jax.publish.cross_host import cross_host_copy


def main(rank: int, own_address: str, job_address: str, num_bytes: int, repeats: int) -> None:
    """Copy `repeats` times after one that is not counted."""
    jax.config.update("jax_cross_host_transfer_socket_address", own_address)
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(job_address, 2, rank)
    sources, targets = (
        NamedSharding(Mesh(np.array([device]), ("x",), axis_types=(AxisType.Auto,)), P())
        for device in (jax.devices()[0], jax.devices()[-1])
    )
    wanted = jax.ShapeDtypeStruct((num_bytes // 4,), jnp.float32)
    array = jax.device_put(np.ones(wanted.shape, np.float32), sources) if rank == 0 else wanted
    seconds = []
    for _ in range(1 + repeats):
        multihost_utils.sync_global_devices("copy")
        began = time.perf_counter()
        jax.block_until_ready(cross_host_copy(array, sources, targets))
        seconds.append(time.perf_counter() - began)
    if rank == 1:
        print(min(seconds[1:]), flush=True)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
