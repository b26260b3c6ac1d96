"""What the tests of the disk cache share: signals of a small model, a stream that answers them, caches and their replays."""

import multiprocessing
from pathlib import Path

import torch

from megapd.batch import Batch
from megapd.errors import UserError
from megapd.schedule.plan import Plan
from megapd.signals import Head, Signal, SignalSpec
from megapd.teacher.cache import CachedStream, SignalCache
from megapd.trajectory import Checkpoint

STEPS, GLOBAL = 8, 6
CLASSES, WIDTH = 9, 4
PLAN = Plan("explicit", STEPS, ((0, 10), (3, 20), (6, 30)))
SPECS = [
    SignalSpec("dense"),
    SignalSpec("dense", "bf16"),
    SignalSpec("hidden", "fp16"),
    SignalSpec("hidden", "int8"),
    SignalSpec("topk", "bf16", k=3),
    SignalSpec("sampled", k=4, seed=1),
    SignalSpec("argmax"),
]


def digest(step):
    return f"{step:064x}"


class Steps:
    """A trajectory of checkpoints that hold no weights."""

    def __init__(self, written=(10, 20, 30)):
        self.steps = written

    def written(self, step):
        return step in self.steps

    def checkpoint(self, step):
        if step not in self.steps:
            raise UserError(f"no checkpoint of step {step}")
        return Checkpoint(step, Path("nowhere"), digest(step), "", {}, {}, {})


class Source:
    """A stream of a small model's signals, which counts what it is asked."""

    def __init__(self, spec, plan=PLAN):
        self.spec, self.plan = spec, plan
        self.asked, self.requested, self.rotations = [], [], []
        self.closed = False

    def ready(self, step):
        return True

    def teacher(self, step):
        self.rotations.append(self.plan.checkpoint_at(step))
        return Steps().checkpoint(self.rotations[-1])

    def request(self, step, batches):
        self.requested.append((step, [batch.digest for batch in batches]))

    def signals(self, step, batches):
        checkpoint = self.teacher(step)
        self.asked.append((step, [batch.digest for batch in batches]))
        return (answer(self.spec, checkpoint.step, batch) for batch in batches)

    def close(self):
        self.closed = True


def answer(spec, teacher_step, batch, noise=0.0):
    """A signal that depends on the teacher and the tokens of each sample, as a model's does; noise: of another tiling."""
    generator = torch.Generator().manual_seed(teacher_step)
    table = torch.randn(64, WIDTH, generator=generator)
    weight = torch.randn(CLASSES, WIDTH, generator=generator)
    rows = batch.positions // batch.ids.shape[1]
    hidden = table[batch.ids.flatten()[batch.positions] % 64] + table[batch.ids[:, 0] % 64][rows] + noise
    # Elementwise: a matrix product may round differently for another number of rows.
    logits = (hidden.double()[:, None, :] * weight.double()).sum(-1).float()
    fields = {}
    if spec.kind == "dense":
        values = logits
    elif spec.kind == "hidden":
        values, fields = hidden, {"head": Head(weight, None)}
    elif spec.kind == "argmax":
        values = logits.argmax(-1)
    elif spec.kind == "topk":
        top = logits.log_softmax(-1).topk(spec.k)
        values, fields = top.indices, {"logprobs": top.values, "log_rest": (1 - top.values.exp().sum(-1)).log()}
    else:
        values = torch.stack([logits.argmax(-1)] * spec.k, -1)
    return Signal(spec, digest(teacher_step), batch.digest, values, **fields)


def batch_at(step, rows):
    """The rows of a step's global batch: pure functions of (step, row), with 0 to 4 labelled positions each."""
    ids, places = [], []
    for number, row in enumerate(rows):
        generator = torch.Generator().manual_seed(step * GLOBAL + row)
        ids.append(torch.randint(0, 1000, (5,), generator=generator))
        count = int(torch.randint(0, 5, (1,), generator=generator))
        places.append(torch.randperm(5, generator=generator)[:count].sort().values + 5 * number)
    positions = torch.cat(places)
    samples = torch.tensor([step * GLOBAL + row for row in rows])
    return Batch(torch.stack(ids), None, positions, torch.zeros_like(positions), samples)


def tiles(step, micro, rank=0, ranks=1):
    return [batch_at(step, range(start, start + micro)) for start in range(rank * micro, GLOBAL, ranks * micro)]


def make_cache(folder, **settings):
    return SignalCache(folder, **{"refresh_seconds": 0.0, **settings})


def walk(stream, micro=3, steps=range(STEPS), ahead=0, **tiling):
    """All signals of some steps, by step, as a loop takes them."""
    batches = {step: tiles(step, micro, **tiling) for step in steps}
    taken = {}
    for step in steps:
        for upcoming in range(step, step + ahead + 1):
            if upcoming in batches and upcoming not in getattr(stream, "known", set()):
                stream.known = {*getattr(stream, "known", set()), upcoming}
                stream.request(upcoming, batches[upcoming])
        taken[step] = list(stream.signals(step, batches[step]))
    return taken


def bits(signal):
    tensors = [signal.values, signal.logprobs, signal.log_rest, None if signal.head is None else signal.head.weight]
    return (signal.teacher, signal.samples, *((t.dtype, tuple(t.shape), t.tolist()) for t in tensors if t is not None))


def recorded(folder, spec, micro=3, **settings):
    """Record the whole plan; what the recording run was taught by."""
    source = Source(spec)
    stream = CachedStream(make_cache(folder, **settings), PLAN, spec, Steps(), source, classes=CLASSES)
    taken = walk(stream, micro)
    stream.close()
    assert source.closed
    return taken


def replay(folder, spec, plan=PLAN, source=None, **settings):
    return CachedStream(make_cache(folder, **settings), plan, spec, Steps(), source, classes=CLASSES)


def parts(folder):
    return sorted(folder.glob("*/*/part-*.arrow"))


def one_part(folder, spec, samples=6):
    """A cache of one part, its path, and the whole batch that it answers."""
    cache, batch = make_cache(folder), batch_at(0, range(samples))
    cache.record(answer(spec, 10, batch), batch, CLASSES)
    cache.close()
    [path] = parts(folder)
    return path, batch


def fork(function, *arguments):
    """Run a function in a process of its own: forked, since to import torch again takes seconds."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    return process
