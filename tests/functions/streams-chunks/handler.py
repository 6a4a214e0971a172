"""A bare generator: an answer of unknown length, in chunks of bytes and of text."""


def handle(event, context):
    yield b"one "
    yield "two "
    yield b"three"
