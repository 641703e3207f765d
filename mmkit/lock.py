"""One process at a time in a run directory."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from pathlib import Path
from typing import IO

from mmkit.errors import InputError
from mmkit.files import Writing

logger = logging.getLogger(__name__)
NAME = ".lock"


class FolderLock:
    """A lock on a folder that the system gives back when the process ends, however it ends."""

    # fcntl and not flock: a loader worker inherits a flock, and would hold it on when its parent is killed.
    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME
        self._file: IO[str] | None = None

    def take(self) -> None:
        """Lock the folder, which is made if need be.

        Raises:
            InputError: Another process holds it (named with its machine), or nothing can be written there.
        """
        while self._file is None:
            self._try()

    def _try(self) -> None:
        """Lock the file that has the name now; leaves `_file` unset where it was deleted meanwhile."""
        with Writing(self._path.parent):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Appending: opened for writing, it would lose its holder's name before anyone knows who has the lock.
            file = self._path.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                # Some network file systems have no locks; a run there is no worse off than without any.
                logger.warning("%s: no lock (%s)", self._path, error.strerror)
                self._file = file
                return
            # The holder wrote itself down after it had the lock; a reader in between finds nothing.
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            what = f"{holder} is at work in this run directory"
            raise InputError(what, where=self._path.parent, mend="wait for it or end it, or use another run=DIR") from None
        # Deleted by its last holder after it was opened here: somebody else may hold the new file of that name.
        if not self._path.exists() or not os.path.samestat(os.fstat(file.fileno()), self._path.stat()):
            file.close()
            return
        with Writing(self._path):
            # What a killed holder left.
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        self._file = file

    def give_back(self) -> None:
        """Unlock. The file stays; whoever deletes it must hold it while doing so."""
        if self._file is not None:
            # Closing any handle of the file in this process would unlock it; this is the only one.
            self._file.close()
            self._file = None
