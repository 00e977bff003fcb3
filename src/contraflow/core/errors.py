"""What a user can mend. Apart from everything else, so that the command line need not import JAX to report it."""


class UserError(Exception):
    """A mistake the user can mend: printed as one line that names the remedy; the command line exits with code 2."""


__all__ = ["UserError"]
