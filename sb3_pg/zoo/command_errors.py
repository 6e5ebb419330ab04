"""Errors of the command line."""


class CommandError(ValueError):
    """The command line or a config file asks for something that is not possible. Nothing was written."""
