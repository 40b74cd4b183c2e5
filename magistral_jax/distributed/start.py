"""Joining the processes of a trainer with `jax.distributed`."""

import jax

from magistral_jax.distributed.config import DistributedConfig
from magistral_jax.records import MagistralError


def start(config: DistributedConfig) -> None:
    """Wait for the other processes, so that `jax.devices()` are those of all; before anything else uses jax.

    Raises:
      MagistralError: They cannot be reached, or the environment says nothing of them.
    """
    if not config.coordinator:
        return
    explicit = config.coordinator != "auto"
    if explicit and not 0 <= config.process_id < config.num_processes:
        raise MagistralError(
            f"`distributed.process_id` is {config.process_id}; it must be less than `distributed.num_processes` "
            f"({config.num_processes})."
        )
    # Else SIGTERM would do nothing: jax keeps it as a notice of preemption, which nothing here reads.
    jax.config.update("jax_enable_preemption_service", False)
    place = (config.coordinator, config.num_processes, config.process_id) if explicit else (None, None, None)
    try:
        jax.distributed.initialize(
            *place,
            initialization_timeout=int(config.start_seconds),
            heartbeat_timeout_seconds=max(1, int(config.heartbeat_seconds)),
        )
    except (RuntimeError, ValueError) as error:
        where = config.coordinator if explicit else "the environment's coordinator"
        reason = " ".join(str(error).split())[:300]
        raise MagistralError(f"The processes of the trainer did not meet at {where}: {reason}") from error
