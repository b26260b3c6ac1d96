"""A teacher process that takes 0.7 s a request: it prints its port, `asked` at each request, `drained` at its end."""

import time

from megapd.teacher.server import serve
from tests.teacher.serving import FakeReplica, configuration


class Slow(FakeReplica):
    def signal(self, *arguments):
        print("asked", flush=True)
        time.sleep(0.7)
        return super().signal(*arguments)


if __name__ == "__main__":
    serve(configuration(), Slow(), ready=lambda port: print(port, flush=True))
    print("drained", flush=True)
