"""Vision-language models that pruners plug into."""

from ocvtp.hosts.attach import Handle, attach, attached
from ocvtp.hosts.registry import find_host, register_host

__all__ = ["Handle", "attach", "attached", "find_host", "register_host"]
