"""Settings of the HTTP service."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """Where the service listens and what it lets clients ask for."""

    host: str = "127.0.0.1"
    """Address to listen on; the default answers this machine only. Only the admin routes ask for a token."""
    port: int = 8000
    """Port to listen on; 0 takes a free one and says which."""
    model_name: str = ""
    """Name of the model for clients; empty takes the name of the folder `policy.path`."""
    max_pending: int = 256
    """Completions that may wait for a slot; a request beyond that is answered with 429."""
    max_connections: int = 1024
    """Connections that are answered at one time; requests on others get 503, whatever they ask for."""
    request_seconds: float = 60.0
    """How long a connection may be without a whole request, before the first one and after each, until it is closed."""
    max_choices: int = 128
    """Completions of one request: its prompts times `n`."""
    max_top_logprobs: int = 1
    """Most `top_logprobs` (`logprobs` of completions) that may be asked for. Above 1 each decode step looks for that
    many most probable tokens, whether somebody asks or not; up to 1 only the sampled token's log-prob is known."""
    max_body_mib: int = 8
    """Size of a request's body in MiB."""
    drain_seconds: float = 30.0
    """How long Ctrl-C waits for running requests before it gives them up."""
    admin_token_file: str = ""
    """File that holds the bearer token of the admin routes; empty refuses them to everybody."""
    warm_up: bool = True
    """Compile every shape before the first request is accepted."""
