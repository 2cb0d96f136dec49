"""A bell as bytes: the ids of its jobs, nothing else."""

import msgspec

from viralfx.domain.jobs.transport import Bell


class UnknownMessageError(Exception):
    """This is no bell."""


class _Message(msgspec.Struct, frozen=True):
    # Fields of a later release are passed over: during a deployment it rings older workers.
    ids: tuple[str, ...]


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(_Message).decode


def encode(bell: Bell) -> bytes:
    """Return a bell as JSON; the queue is where it is put."""
    return _encode(_Message(ids=tuple(bell.ids)))


def decode(queue: str, data: bytes) -> Bell:
    """Return the bell that was put into a queue. Raises :class:`UnknownMessageError`."""
    try:
        message = _decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise UnknownMessageError(str(error)) from None
    return Bell(queue=queue, ids=message.ids)
