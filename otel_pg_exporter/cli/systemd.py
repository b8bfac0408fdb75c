"""What systemd is told of `serve`, by datagrams to $NOTIFY_SOCKET as sd_notify(3) has them; without one, nothing is."""

import logging
import os
import socket
from collections.abc import MutableMapping

_logger = logging.getLogger(__name__)

_TIMEOUT = 1.0  # seconds that systemd may leave its socket full


class Systemd:
    """The supervisor, if there is one."""

    def __init__(self, environment: MutableMapping[str, str]) -> None:
        """Take from the environment what is meant for this process alone: PostgreSQL, as a child, would notify too."""
        address = environment.pop("NOTIFY_SOCKET", "")
        watchdog, process = environment.pop("WATCHDOG_USEC", ""), environment.pop("WATCHDOG_PID", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address  # abstract, or a path
        mine = watchdog.isdigit() and process in {"", str(os.getpid())}
        self.watchdog_timeout = int(watchdog) / 1e6 if mine else None
        """Seconds within which `alive` must be called again and again, lest systemd kill us; None: it need not be."""

    def ready(self, status: str) -> None:
        """Tell that it serves, and in a line what."""
        self._tell(f"READY=1\nSTATUS={status}")

    def stopping(self) -> None:
        """Tell that it is about to end."""
        self._tell("STOPPING=1\nSTATUS=finishing what is in flight")

    def alive(self) -> None:
        """Tell that all is well; wanted within each `watchdog_timeout`."""
        if self.watchdog_timeout is not None:
            self._tell("WATCHDOG=1")

    def _tell(self, message: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sending:
                sending.settimeout(_TIMEOUT)
                sending.sendto(message.encode(), self._address)
        except OSError as exc:
            _logger.warning("systemd, which is to be told %s, does not listen: %s", message.partition("\n")[0], exc)
