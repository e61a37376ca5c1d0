"""What the user can mend: the exception that the command line turns into a message, and how to know a full disk."""

import errno

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
FULL_DISK_TEXTS = ("No space left on device", "os error 28", "Disk quota exceeded", "os error 122")


class UserError(ValueError):
    """Bad input or an environment the user can mend; the text names what was expected, what came and the remedy."""


def is_full_disk(error: BaseException) -> bool:
    """Whether `error` says that the disk or the quota is full."""
    if isinstance(error, OSError) and error.errno in FULL_DISK:
        return True
    # safetensors and torch report a failed write as an error type of their own, with the system's text inside.
    return any(text in str(error) for text in FULL_DISK_TEXTS)
