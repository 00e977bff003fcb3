"""Checks of settings with a uniform message that names the field."""


def check_count(settings: object, least: int, *names: str) -> None:
    """Raises ValueError for a field of `settings` that is not a whole number of at least `least`."""
    for name in names:
        value = getattr(settings, name)
        if type(value) is not int or value < least:
            raise ValueError(f"{type(settings).__name__}: {name} must be a whole number, at least {least}, got {value}")
