"""`opendelta.utils.logging` of OpenDelta 0.3: loggers of Python under the name `opendelta`."""

import logging
from logging import CRITICAL, DEBUG, ERROR, FATAL, INFO, NOTSET, WARN, WARNING

from opendelta._compat.gone import refuses

__all__ = [
    "CRITICAL", "DEBUG", "ERROR", "FATAL", "INFO", "NOTSET", "WARN", "WARNING", "get_logger",
    "get_verbosity", "set_verbosity", "set_verbosity_debug", "set_verbosity_error",
    "set_verbosity_info", "set_verbosity_warning",
]  # fmt: skip


__getattr__ = refuses(
    __name__,
    dict.fromkeys(
        [
            "add_handler", "disable_default_handler", "disable_propagation",
            "enable_default_handler", "enable_explicit_format", "enable_propagation",
            "get_log_levels_dict", "remove_handler", "reset_format",
        ],
        "get_logger() is a logger of Python, whose handlers and levels are set as the module "
        "logging of Python says",
    ),
)  # fmt: skip


def get_logger(name: str | None = None, verbosity: str | int | None = None) -> logging.Logger:
    """Return the logger `name`. None: the library's.

    Args:
        verbosity: the least level that it prints, such as "info" or `INFO`. None: as it is.
    """
    logger = logging.getLogger("opendelta" if name is None else name)
    if verbosity is not None:
        logger.setLevel(verbosity.upper() if isinstance(verbosity, str) else verbosity)
    return logger


def get_verbosity() -> int:
    """Return the least level that the library's logger prints."""
    return get_logger().getEffectiveLevel()


def set_verbosity(verbosity: int) -> None:
    """Set the least level that the library's logger prints."""
    get_logger().setLevel(verbosity)


def set_verbosity_debug() -> None:
    """Print messages of all levels."""
    set_verbosity(DEBUG)


def set_verbosity_info() -> None:
    """Print infos and all that is graver."""
    set_verbosity(INFO)


def set_verbosity_warning() -> None:
    """Print warnings and errors."""
    set_verbosity(WARNING)


def set_verbosity_error() -> None:
    """Print errors only."""
    set_verbosity(ERROR)
