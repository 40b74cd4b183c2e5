"""`magistral-jax generator`: samples for a trainer on another host, until that run is over."""

import argparse
from collections.abc import Sequence

from magistral_jax.commands.setup import say
from magistral_jax.generate.remote import join, read_token
from magistral_jax.generate.worker import Worker, leave
from magistral_jax.records import MagistralError


def generator(words: Sequence[str]) -> None:
    """Join the run whose trainer listens at an address.

    Raises:
      MagistralError: Nobody listens there, it does not let us in, or it is gone before the run is over.
    """
    parser = argparse.ArgumentParser(
        prog="magistral-jax generator",
        description="Sample for a trainer on another host (generation.where = remote) until its run is over. Model, "
        "settings and weights come from there; this host needs nothing but the package.",
    )
    parser.add_argument("address", metavar="HOST:PORT", help="where the trainer listens (generation.listen)")
    parser.add_argument("--token-file", default="", help="file with the secret of the run (generation.token_file)")
    args = parser.parse_args(words)
    worker = Worker(join(args.address, read_token(args.token_file)), f"the trainer at {args.address}")
    say(f"joined the run of {args.address}")
    try:
        is_over = worker.run()
    except MagistralError as error:
        worker.report(error)
        raise
    except Exception as error:
        worker.fail(error)
    if not is_over:
        worker.close()
        raise MagistralError(f"The trainer at {args.address} is gone.")
    say("the run is over")
    leave(0)
