"""What the environment is at import, in `load` and in `handle`: only the last may hold what the deployment sets.

Values of ``SEEN_BY_LOAD`` (which `snapshot.env` names) are there from the beginning.
"""

import os

AT_IMPORT = dict(os.environ)


def load(device):
    return dict(os.environ)


def handle(event, context):
    name = event.query["name"]
    return {
        "statusCode": 200,
        "body": {"import": AT_IMPORT.get(name), "load": context.model.get(name), "handle": os.environ.get(name)},
    }
