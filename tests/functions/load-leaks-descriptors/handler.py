"""`load` leaves files and a pipe open: they are there after a restore, at the same place in the file."""

import os
import tempfile


def load(device):
    file = tempfile.TemporaryFile()  # noqa: SIM115  # its name is gone already: that is the point
    file.write(b"kept")
    file.flush()
    descriptors = [os.open(__file__, os.O_RDONLY) for _ in range(100)]
    os.read(descriptors[0], 3)
    reader, writer = os.pipe()
    os.write(writer, b"in the pipe")
    return file, descriptors, reader, writer


def handle(event, context):
    file, descriptors, _, _ = context.model
    file.seek(0)
    return {
        "statusCode": 200,
        "body": {
            "file": file.read().decode(),
            "offset": os.lseek(descriptors[0], 0, os.SEEK_CUR),
            "open": sum(1 for descriptor in descriptors if os.fstat(descriptor).st_size),
        },
    }
