"""The error for mistakes that the user can fix. It stands alone so that the command line can report it without JAX."""


class UserError(Exception):
    """A mistake that the user can fix, printed as one line with the remedy; the command line exits with code 2."""


IN_CALLBACK: list[UserError] = []
"""What callbacks of compiled programs raised; JAX reports an error of its own, which quotes it."""

__all__ = ["IN_CALLBACK", "UserError"]
