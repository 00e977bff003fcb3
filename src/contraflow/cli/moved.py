"""Flags of the first edition, and what they are called now: an old one gets one line that names the new one."""

MOVED: dict[str, str] = {}
