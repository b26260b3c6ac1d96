"""A student's process that lends a teacher 1 MiB of memory, megapd-test, prints its descriptor, and waits to be killed."""

import fcntl
import os
import signal

if __name__ == "__main__":
    fd = os.memfd_create("megapd-test", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 1 << 20)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    print(fd, flush=True)
    signal.pause()
