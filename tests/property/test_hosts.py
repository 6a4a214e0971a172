import contextlib
import json
import tempfile
from pathlib import Path

from hypothesis import given, strategies as st

from adapter.errors import NotFound
from adapter.hosts.folders import FunctionFolders
from adapter.hosts.replica_log import ReplicaLog
from tests.fakes.host import AtOnce

NAMES = st.from_regex(r"[a-z0-9]([-a-z0-9]{0,10}[a-z0-9])?", fullmatch=True)
PARTS = st.lists(st.from_regex(r"[a-z0-9.:-]{1,10}", fullmatch=True), max_size=3)


@given(st.text() | st.lists(st.sampled_from(["..", ".", "/", "fn", ":", "@", "~", "\\", "\0"])).map("".join))
def test_no_image_leads_out_of_the_roots(image):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve() / "root"
        (root / "fn").mkdir(parents=True)
        (root / "fn" / "handler.py").touch()
        (root.parent / "handler.py").touch()
        with contextlib.suppress(NotFound):
            assert FunctionFolders([root]).resolve(image) == root / "fn"


@given(PARTS, NAMES, st.none() | st.from_regex(r"[A-Za-z0-9_.-]{1,10}", fullmatch=True), st.booleans())
def test_registry_tag_and_digest_do_not_matter(registry, name, tag, digest):
    image = "/".join([*registry, name]) + (f":{tag}" if tag else "") + ("@sha256:00ff" if digest else "")
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder).resolve() / name
        wanted.mkdir()
        (wanted / "handler.py").touch()
        assert FunctionFolders([Path(folder)]).resolve(image) == wanted


@given(st.lists(st.binary(max_size=20)), st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=50))
def test_log_lines_do_not_depend_on_how_output_was_cut(noise, text):
    whole = b"\n".join(noise) + text.encode()
    with tempfile.TemporaryDirectory() as folder:
        logged = []
        for number, cuts in enumerate(([whole], [whole[i : i + 1] for i in range(len(whole))])):
            path = Path(folder) / str(number)
            log = ReplicaLog(path, "a", AtOnce())
            for part in cuts:
                log.feed(part)
            log.close()
            logged.append([json.loads(line)["text"] for line in path.read_text().splitlines()] if path.exists() else [])
        assert logged[0] == logged[1]
        assert "\n".join(logged[0]) == whole.decode(errors="replace").removesuffix("\n") or not whole
