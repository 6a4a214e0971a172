"""The desired state of a cluster: functions as ConfigMaps, kept current by watches, so that several gateways and kubectl
may write it; namespaces that are labelled or annotated ``openfaas``; Secrets. What these objects look like is
`adapter.openfaas.cluster_records`'.

A record owns all that is made for its function, so that deleting it is removing the function.

Rights. Everywhere: namespaces get list watch; to serve `/system/namespace/…` also namespaces create patch delete,
rolebindings create, and bind of the cluster role that is given to us in a new namespace. In each namespace of
functions: configmaps get list watch create update delete; secrets get list create patch delete.
(`adapter.hosts.kubernetes` needs more.)
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from adapter.cluster.api import Api
from adapter.cluster.informer import Informer
from adapter.cluster.resources import CONFIG_MAPS, NAMESPACES, Resource
from adapter.errors import AdapterError, Conflict, NotFound, Unavailable
from adapter.hosts.background import Background
from adapter.hosts.kubernetes_pods import MANAGED_BY, MANAGER, SELECTOR, record_name
from adapter.openfaas.catalog import (
    Entry,
    ImageFacts,
    Listener,
    check_unused,
    namespace_exists,
    unknown_namespace,
)
from adapter.openfaas.cluster_records import (
    NAMESPACE_MARK,
    Namespace,
    Record,
    is_before,
    marked,
    read_if_record,
    read_namespace,
    read_record,
    record_of,
)
from adapter.openfaas.cluster_secrets import ClusterSecrets
from adapter.openfaas.wire import FunctionDeployment, unknown_function

logger = logging.getLogger(__name__)

_OWN_NAME = "kubernetes.io/metadata.name"
"""Label that Kubernetes gives every namespace."""
_ROLE_BINDINGS = Resource("rbac.authorization.k8s.io", "v1", "rolebindings", "RoleBinding")
_TRIES = 5
"""Of a write that others are faster than."""
_SYNC_LIMIT_S = 15.0
"""For a namespace's records, before a gateway begins without them: it may have no rights there."""
_REMEMBERED = 1000

Look = Callable[[FunctionDeployment], Awaitable[ImageFacts | None]]


@dataclass(frozen=True, slots=True)
class Membership:
    """How this gateway gets its rights in a namespace that it makes: a binding of `role` (a ClusterRole) to the service
    account `account` of `namespace`. Without a role, somebody else gives them."""

    role: str = ""
    account: str = ""
    namespace: str = ""


class ClusterCatalog:
    """See `adapter.openfaas.catalog.Catalog`. Make it inside a running event loop, `open` it, close it when done.

    `default` is a namespace of functions whatever its labels say. `look` asks what an image is whose function was edited
    by hand.
    """

    def __init__(
        self,
        api: Api,
        secrets: ClusterSecrets,
        default: str,
        look: Look,
        membership: Membership,
    ) -> None:
        self._api = api
        self._default = default
        self._look = look
        self._membership = membership
        self._secrets = secrets
        self._joined: Callable[[str], None] = lambda _: None
        self._left: Callable[[str], None] = self._joined
        self._listener: Listener | None = None
        self._background = Background()
        self._known: dict[str, Namespace] = {}
        self._records: dict[str, Record] = {}
        self._writing: set[str] = set()  # keys
        self._gone: OrderedDict[str, str] = OrderedDict()
        """Uids, and the version after which news is not late; empty: not before the watch has told of the end."""
        self._watches: dict[str, asyncio.Task[None]] = {}
        self._informers: dict[str, Informer[Record]] = {}
        self._namespaces = Informer(api, NAMESPACES.path(), lambda data: read_namespace(data, default))
        self._namespaces.on_change(self._namespace_changed)

    async def open(self, joined: Callable[[str], None], left: Callable[[str], None]) -> None:
        """Begin to watch; returns when what there is, is known. `joined` and `left` are told of namespaces of functions
        that come and go."""
        self._joined, self._left = joined, left
        self._watches[""] = asyncio.get_running_loop().create_task(self._namespaces.run())
        self._join(Namespace(self._default))
        await self._namespaces.synced.wait()
        await asyncio.gather(*(self._sync(name, one) for name, one in self._informers.items()))

    async def _sync(self, namespace: str, informer: Informer[Record]) -> None:
        try:
            await asyncio.wait_for(informer.synced.wait(), _SYNC_LIMIT_S)
        except asyncio.TimeoutError:
            fields = {"namespace": namespace, "hint": "Bind the provider's role there: see docs/how-to."}
            logger.warning("the functions of a namespace are not known yet", extra={"fields": fields})

    async def close(self) -> None:
        for watch in self._watches.values():
            watch.cancel()
        await asyncio.gather(*self._watches.values(), return_exceptions=True)
        self._background.cancel()
        await self._background.join()

    @property
    def is_current(self) -> bool:
        """Whether what is known of the default namespace is not old."""
        return self._namespaces.healthy and self._informers[self._default].healthy

    def listen(self, listener: Listener) -> None:
        self._listener = listener

    # Functions ----------------------------------------------------------------------------------

    def functions(self, namespace: str | None = None) -> list[Entry]:
        entries = (record.entry for record in self._records.values())
        found = [e for e in entries if e is not None and namespace in (None, e.deployment.namespace)]
        return sorted(found, key=lambda entry: entry.deployment.key)

    def get(self, key: str) -> Entry:
        record = self._records.get(key)
        if record is None or record.entry is None:
            raise unknown_function(key)
        return record.entry

    def uid(self, key: str) -> str:
        """Of a function's record; empty where there is none."""
        record = self._records.get(key)
        return "" if record is None else record.uid

    async def put(self, deployment: FunctionDeployment, created_at: str, image: ImageFacts | None = None) -> Entry:
        """When it was created is the API server's to say."""
        with self._writes(deployment.key):
            for _ in range(_TRIES):
                try:
                    self._accept(await self._write(deployment, image, self._records.get(deployment.key)))
                    return self.get(deployment.key)
                except Conflict:  # another writer was faster: on top of what there is now
                    await self._read_again(deployment)
            raise Unavailable(f"{deployment.key} is being changed by others.", hint="Try again.", code="busy")

    @contextmanager
    def _writes(self, key: str) -> Iterator[None]:
        """Meanwhile the listener is not told of it: the watch may be faster than the answer, and who deploys goes on
        with what was written. Where nothing was, it is told of what others did."""
        self._writing.add(key)
        told = self._records.get(key)
        try:
            yield
        except BaseException:
            now = self._records.get(key)
            if now is not None and now is not told and now.entry is not None and self._listener is not None:
                self._listener.deployed(now.entry)
            raise
        finally:
            self._writing.discard(key)

    async def _write(self, deployment: FunctionDeployment, image: ImageFacts | None, old: Record | None) -> Record:
        revision = 1 if old is None or old.entry is None else old.entry.revision + 1
        body = record_of(deployment, revision, image)
        path = CONFIG_MAPS.path(deployment.namespace)
        if old is None:
            return read_record(await self._api.create(path, body))
        body["metadata"]["resourceVersion"] = old.version
        name = record_name(deployment.service)
        try:
            return read_record(await self._api.replace(CONFIG_MAPS.path(deployment.namespace, name), body))
        except NotFound as error:
            self._lose(old)
            raise Conflict(error.message, why=error.why) from error

    async def _read_again(self, deployment: FunctionDeployment) -> None:
        """Raises `Conflict` where its place is taken."""
        name = record_name(deployment.service)
        try:
            there = await self._api.get(CONFIG_MAPS.path(deployment.namespace, name))
        except NotFound:
            old = self._records.get(deployment.key)
            if old is not None:
                self._lose(old)
            return
        record = read_if_record(there)
        if record is None:
            raise Conflict(
                f"The ConfigMap {name} of {deployment.namespace} is somebody else's.",
                why=f"{deployment.key} would be kept there.",
                hint="Rename the function, or remove that ConfigMap.",
                code="record-foreign",
            )
        self._accept(record)

    async def remove(self, key: str) -> Entry:
        entry, record = self.get(key), self._records[key]
        deployment = entry.deployment
        path = CONFIG_MAPS.path(deployment.namespace, record_name(deployment.service))
        try:
            await self._api.delete(path, uid=record.uid)
        except Conflict as error:  # it was removed and deployed anew meanwhile
            raise unknown_function(key) from error
        self._forget(record)
        return entry

    # What the watches say -----------------------------------------------------------------------

    def _record_changed(self, _key: str, old: Record | None, new: Record | None) -> None:
        if new is None:
            if old is not None:
                self._lose(old)
                self._gone[old.uid] = old.version  # told in order: if it comes again, others have marked it again
            return
        known = self._records.get(new.key)
        if known is not None and _is_put_back(new, known):
            new = replace(new, is_edited=True)
        if not self._accept(new) or new.key in self._writing:
            return
        if new.problem:
            fields = {"function": new.key, "why": new.problem}
            logger.warning("a function's record cannot be used", extra={"fields": fields})
        elif new.is_edited:
            self._background.run(self._take_edit(new))
        elif new.entry is not None and self._listener is not None:
            self._listener.deployed(new.entry)

    def _accept(self, new: Record) -> bool:
        """Whether that is news."""
        old = self._records.get(new.key)
        if old == new or self._is_late(new) or (old is not None and is_before(new.version, old.version)):
            return False
        if old is not None and old.uid != new.uid:
            self._lose(old)  # and made anew: another function, whose revisions count from the beginning
        elif old is not None and not _is_revision_after(new, old):  # what runs stays until an edit is one
            self._records[new.key] = Record(new.key, new.uid, new.version, old.entry)
            return new.entry is None or new.is_edited
        self._records[new.key] = new
        return True

    def _is_late(self, new: Record) -> bool:
        end = self._gone.get(new.uid)
        return end is not None and not is_before(end, new.version)

    def _lose(self, record: Record) -> None:
        """Others have removed it."""
        if self._forget(record) and self._listener is not None:
            self._listener.removed(record.key)

    def _forget(self, record: Record) -> bool:
        self._gone[record.uid] = ""
        if len(self._gone) > _REMEMBERED:
            self._gone.popitem(last=False)
        known = self._records.get(record.key)
        if known is None or known.uid != record.uid:
            return False
        del self._records[record.key]
        return True

    async def _take_edit(self, record: Record) -> None:
        """Somebody changed a deployment by hand: that is a deploy, of which a revision is made."""
        assert record.entry is not None
        wanted, image = record.entry.deployment, None
        try:
            image = await self._look(wanted)
        except AdapterError as error:
            image = ImageFacts(wanted.image, note=f"the image could not be looked at: {error.message}")
        try:
            with self._writes(record.key):
                known = self._records.get(record.key, record)  # its revisions count on, whatever the edit says
                written = await self._write(wanted, image, replace(record, entry=known.entry or record.entry))
                self._accept(written)
        except AdapterError as error:
            fields = {"function": record.key, "why": error.why or error.message}
            logger.warning(
                "an edit was not taken", extra={"fields": fields}
            )  # another gateway has, or the watch tells again
            return
        if self._listener is not None and written.entry is not None:
            self._listener.deployed(written.entry, first=True)

    # Namespaces ---------------------------------------------------------------------------------

    def _namespace_changed(self, _key: str, old: Namespace | None, new: Namespace | None) -> None:
        if new is not None:
            self._join(new)
        elif old is not None and old.name != self._default:
            self._leave(old.name)

    def _join(self, namespace: Namespace) -> None:
        is_new = namespace.name not in self._known
        self._known[namespace.name] = namespace
        if not is_new:
            return
        informer = Informer(self._api, CONFIG_MAPS.path(namespace.name), read_if_record, label_selector=SELECTOR)
        informer.on_change(self._record_changed)
        self._informers[namespace.name] = informer
        self._joined(namespace.name)
        self._watches[namespace.name] = asyncio.get_running_loop().create_task(informer.run())

    def _leave(self, name: str) -> None:
        if self._known.pop(name, None) is None:
            return
        self._watches.pop(name).cancel()
        del self._informers[name]
        for record in [r for r in self._records.values() if r.key.rpartition(".")[2] == name]:
            self._lose(record)
            del self._gone[record.uid]  # who comes back lists anew
        self._left(name)

    def namespaces(self) -> list[str]:
        return sorted(self._known)

    def keeps_snapshots(self, name: str) -> bool:
        return name in self._known and self._known[name].keeps_snapshots

    def namespace(self, name: str) -> dict[str, Any]:
        if name not in self._known:
            raise unknown_namespace(
                name,
                why=f"The cluster has none, or it has no annotation {NAMESPACE_MARK}=1 that lets functions in.",
                hint=f"kubectl annotate namespace {name} {NAMESPACE_MARK}=1, and bind gpufn-provider-functions to the provider there.",
            )
        namespace = self._known[name]
        annotations = {key: text for key, text in namespace.annotations if key != NAMESPACE_MARK}
        labels = {key: text for key, text in namespace.labels if key != _OWN_NAME}  # faas-cli sends the mark as a label
        return {"name": name, "annotations": annotations, "labels": labels}

    async def put_namespace(self, name: str, facts: dict[str, Any], *, new: bool) -> None:
        if not new:
            self.namespace(name)
            changed = await self._api.patch(NAMESPACES.path(name=name), {"metadata": marked(facts)})
            await self._become_member(name)  # whoever made it may have been killed before that
        else:
            if name in self._known:
                raise namespace_exists(name)
            try:
                changed = await self._api.create(NAMESPACES.path(), NAMESPACES.body(name, metadata=marked(facts)))
            except Conflict as error:
                raise Conflict(
                    f"The namespace {name} exists already, and is not one of functions.",
                    hint=f"Make it one: kubectl label namespace {name} {NAMESPACE_MARK}=1",
                    code="namespace-exists",
                ) from error
            await self._become_member(name)
        made = read_namespace(changed, self._default)
        if made is not None:
            self._join(made)

    async def _become_member(self, name: str) -> None:
        membership = self._membership
        if not membership.role:
            return
        body = _ROLE_BINDINGS.body(
            membership.account,
            name,
            metadata={"labels": {MANAGED_BY: MANAGER}},
            roleRef={"apiGroup": _ROLE_BINDINGS.group, "kind": "ClusterRole", "name": membership.role},
            subjects=[{"kind": "ServiceAccount", "name": membership.account, "namespace": membership.namespace}],
        )
        try:
            await self._api.create(_ROLE_BINDINGS.path(name), body)
        except Conflict:
            pass

    async def remove_namespace(self, name: str) -> None:
        self.namespace(name)
        check_unused(name, self.functions(name))
        if name == self._default:
            raise Conflict(f"The namespace {name} cannot be removed: it is the default one.", code="namespace-in-use")
        await self._api.delete(NAMESPACES.path(name=name))
        self._leave(name)

    # Secrets ------------------------------------------------------------------------------------

    async def secrets(self, namespace: str) -> list[str]:
        return await self._secrets.names(namespace)

    async def missing_secrets(self, namespace: str, names: Sequence[str]) -> list[str]:
        return await self._secrets.missing(namespace, names)

    async def put_secret(self, namespace: str, name: str, value: bytes, *, new: bool) -> None:
        await self._secrets.put(namespace, name, value, new=new)

    async def remove_secret(self, namespace: str, name: str) -> None:
        await self._secrets.remove(namespace, name)


def _is_revision_after(new: Record, old: Record) -> bool:
    if new.entry is None or new.is_edited:
        return False
    return old.entry is None or new.entry.revision > old.entry.revision


def _is_put_back(new: Record, known: Record) -> bool:
    """Whether others wrote a revision of before over a later one: whoever deploys counts on."""
    if new.entry is None or known.entry is None or new.uid != known.uid or _is_revision_after(new, known):
        return False
    is_late = new.version != known.version and not is_before(known.version, new.version)
    return not is_late and new.entry.deployment != known.entry.deployment
