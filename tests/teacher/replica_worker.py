"""A teacher's process around a fake replica, by settings of the command line; with --slow it takes 0.7 s a request.

It prints its port, `asked` at each slow request, and `drained` at its end.
"""

import sys
import time

from megapd.teacher.server import serve
from tests.teacher.serving import FakeReplica, configuration


class Slow(FakeReplica):
    def signal(self, *arguments):
        print("asked", flush=True)
        time.sleep(0.7)
        return super().signal(*arguments)


if __name__ == "__main__":
    settings = [argument for argument in sys.argv[1:] if argument != "--slow"]
    replica = Slow() if "--slow" in sys.argv else FakeReplica()
    serve(configuration(*settings), replica, ready=lambda port: print(port, flush=True))
    print("drained", flush=True)
