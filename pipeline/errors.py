"""Errors that are the user's to mend, and the one place where they become an exit status."""

import os
import sys
from collections.abc import Callable
from typing import NoReturn

EXIT_USER_ERROR = 2
EXIT_LOST_CONTACT = 75
EXIT_CHECKPOINTED = 85
"""A signal came, and the job wrote a checkpoint: start it again to go on."""
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
"""As of a process that SIGPIPE ended."""


class UserError(ValueError):
    """The user asked for something impossible; the message says what, where, both values and what to do."""

    status = EXIT_USER_ERROR


class ConfigError(UserError):
    """A recipe or a command line is wrong."""


class DataError(UserError):
    """A data set on disk is broken or does not hold what was asked for."""


class StoreError(UserError):
    """A soft-target store is damaged or was not made for this run."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged or belongs to another run."""


class LostContactError(UserError):
    """Ranks cannot reach each other (any more): the same job may well go on when it is started again."""

    status = EXIT_LOST_CONTACT


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Run a stage's `main` and exit: its status (None: 0), 2 for a UserError (75 for lost contact), 130 for Ctrl-C.

    Other exceptions are defects and keep their traceback.
    """
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # `clkd ... | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        sys.exit(EXIT_BROKEN_PIPE)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.status)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from what is finished", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(status or 0)
