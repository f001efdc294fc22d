"""What a worker shows its routers, and whom it takes for one."""

import grpc

from kvrelay_engine.runtime.config import WorkerConfig
from kvrelay_engine.runtime.join import JoinTls
from kvrelay_protocol.errors import UsageError
from kvrelay_protocol.tls import read_tls


def join_tls(config: WorkerConfig) -> JoinTls | None:
    """Credentials for the routers' join ports; None for plain text.

    Raises:
        UsageError: the files can't be used, or there is no authority to check a router against.
    """
    flags = ("--router-cert", "--router-key", "--router-ca")
    files = read_tls(config.router_cert, config.router_key, config.router_ca, flags=flags)
    if files is None:
        return None
    if files.authority is None:
        raise UsageError("--router-cert needs --router-ca: whose routers may see it")
    credentials = grpc.ssl_channel_credentials(
        root_certificates=files.authority,
        private_key=files.key,
        certificate_chain=files.certificate,
    )
    return JoinTls(credentials, config.router_name)
