"""Errors of the user's input."""

import sys

if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit("SimPER needs Python 3.11 or newer; this is " + sys.version.split()[0])


class InputError(ValueError):
    """The user's input is at fault: the message says what is wrong, where, and what to do."""
