"""Random reads, writes and changes of length of one file, compared with what a file ought to be: fsx in short.

    python3 fsx.py FILE OPERATIONS SEED     # ends with "N operations, no difference"

Reads and writes go through two descriptors and through mappings; between them the file is truncated, made longer, given
room, copied within itself, closed and opened again.
"""

import contextlib
import mmap
import os
import random
import sys

SIZE = 256 << 10

path, count, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
chance = random.Random(seed)
model = bytearray()
fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
other = os.open(path, os.O_RDWR)


def extend(size: int) -> None:
    if len(model) < size:
        model.extend(bytes(size - len(model)))


def compare(what: str, at: int, found: bytes) -> None:
    wanted = bytes(model[at : at + len(found)])
    if found != wanted:
        first = next((i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), len(wanted))
        sys.exit(f"{what} at {at}+{len(found)}, file of {len(model)}: differs from byte {at + first} on")


for step in range(count):
    kind = chance.randrange(11)
    at, length = chance.randrange(SIZE), chance.randrange(1, 40_000)
    file = chance.choice((fd, other))
    what = f"seed {seed}, operation {step}, kind {kind}"
    if kind <= 1:
        data = chance.randbytes(length)
        extend(at)
        model[at : at + length] = data
        assert os.pwrite(file, data, at) == length
    elif kind <= 3:
        found = os.pread(file, length, at)
        assert len(found) == max(min(length, len(model) - at), 0), f"{what}: {len(found)} bytes of {len(model)} at {at}"
        compare(what, at, found)
    elif kind == 4:
        size = chance.randrange(SIZE)
        if size < len(model):
            del model[size:]
        extend(size)
        os.ftruncate(file, size)
    elif kind == 5 and model:
        at %= len(model)
        with mmap.mmap(file, len(model)) as view:
            compare(what, at, view[at : at + length])
    elif kind == 6 and model:
        at %= len(model)
        length = min(length, len(model) - at)
        data = chance.randbytes(length)
        model[at : at + length] = data
        with mmap.mmap(file, len(model)) as view:
            view[at : at + length] = data
    elif kind == 7:
        extend(at + length)
        os.posix_fallocate(file, at, length)
    elif kind == 8 and model:
        source = at % len(model)
        target = chance.randrange(SIZE)
        length = min(length, len(model) - source, abs(source - target))
        done = 0
        with contextlib.suppress(OSError):
            done = os.copy_file_range(file, file, length, source, target) if length else 0
        extend(target if done else 0)
        model[target : target + done] = model[source : source + done]
    elif kind == 9:
        os.fsync(file)
        assert os.fstat(file).st_size == len(model), f"{what}: {os.fstat(file).st_size} bytes, not {len(model)}"
    elif kind == 10:
        os.close(other)
        other = os.open(path, os.O_RDWR)
os.close(fd)
os.close(other)
with open(path, "rb") as last:
    compare(f"seed {seed}, at the end", 0, last.read())
assert os.path.getsize(path) == len(model)
print(f"{count} operations, no difference")
