"""Listening sockets, made by hand so that a port in use is known before anything starts."""

import errno
import os
import socket

from viralfx.domain.errors import StartupError


def listen(variable: str, host: str, port: int, *, backlog: int = 2048) -> socket.socket:
    """Bind and listen.

    Raises :class:`StartupError` with one line that names ``variable`` and what to do.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        # The protocol is named: an event loop sets TCP_NODELAY only on sockets that say TCP, and
        # without it each keep-alive answer waits 40 ms for the client's delayed acknowledgement.
        listener = socket.socket(family, kind, socket.IPPROTO_TCP)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(backlog)
            listener.setblocking(False)
        except BaseException:
            listener.close()
            raise
    except socket.gaierror as error:
        raise StartupError(f"HOST: cannot resolve {host!r}: {error.strerror}") from None
    except UnicodeError:
        raise StartupError(f"HOST: cannot resolve {host!r}: not a host name") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            what = f"port {port} on {host} is in use; stop who has it, or set another"
        elif error.errno == errno.EACCES:
            what = f"no permission for port {port} on {host}; choose one above 1023"
        elif error.errno == errno.EADDRNOTAVAIL:
            what = f"{host} is no address of this machine; set HOST to one that is"
            variable = "HOST"
        else:
            what = f"cannot listen on {host}:{port}: {os.strerror(error.errno or 0)}"
        raise StartupError(f"{variable}: {what}") from None
    # A forked child must not keep the port when this process is gone.
    os.register_at_fork(after_in_child=listener.close)
    return listener
