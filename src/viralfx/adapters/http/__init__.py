"""HTTP as a client: how webhooks leave.

* :class:`HttpWebhookSender` (check_addresses, timeout, tls) posts, to addresses that were looked
  at and to no others.
* :func:`client_context` (ca_file) is the TLS that it takes.
"""

from viralfx.adapters.http.network import SystemResolver
from viralfx.adapters.http.sender import HttpWebhookSender, client_context

__all__ = ["HttpWebhookSender", "SystemResolver", "client_context"]
