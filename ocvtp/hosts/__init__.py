"""Vision-language models that pruners plug into."""

from ocvtp.hosts.attach import Handle, attach, attached
from ocvtp.hosts.registry import find_host, register_host
from ocvtp.hosts.runtime.shared_encodings import SharedEncodings

__all__ = ["Handle", "SharedEncodings", "attach", "attached", "find_host", "register_host"]
