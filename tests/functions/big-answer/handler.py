"""An answer as large as asked for, ``?bytes=1048576``, whole or (``&stream=1``) in pieces."""

PIECE = 65536


def handle(event, context):
    size = int(event.query.get("bytes", 1048576))
    body = pieces(size) if "stream" in event.query else b"x" * size
    return {"statusCode": 200, "body": body, "headers": {"Content-Type": "application/octet-stream"}}


def pieces(size):
    for at in range(0, size, PIECE):
        yield b"x" * min(PIECE, size - at)
