"""A C-STORE SCP (PS3.4 annex B): what a PACS sends goes into the encrypted spool, undecoded.

Who may send: a connection from an address that is not allow-listed is closed before a byte of it is read, and an
association is rejected unless its called AE title is ours and its calling AE title is allow-listed for that very
address. AE titles are not authentication, and an address can be forged inside a network: only TLS with a certificate
that our CA signed keeps others out for certain.

"Success" is answered only when the object and its name are on disk (fsync). A full disk is answered with 0xA700, so the
PACS keeps the object and sends it again; the same goes for an object that cannot be stored for another reason (0x0110).
An object is in memory once while it is received (pynetdicom's other way, a temporary file, would be in clear).
"""

import contextlib
import copy
import errno
import functools
import ssl
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from socket import IPPROTO_TCP, TCP_NODELAY, socket
from socketserver import BaseServer
from typing import Any, Self

from pydicom.uid import UID, AllTransferSyntaxes
from pynetdicom import AE, DEFAULT_TRANSFER_SYNTAXES, AllStoragePresentationContexts, evt
from pynetdicom.dsutils import encode_file_meta
from pynetdicom.presentation import PresentationContext
from pynetdicom.service_class import StorageServiceClass
from pynetdicom.sop_class import register_uid
from pynetdicom.transport import ThreadedAssociationServer

from fedscan_client.intake.sources import spool as spools
from fedscan_client.intake.sources.pull import quiet
from fedscan_client.intake.sources.settings import DimseStore, Tls
from fedscan_client.intake.sources.spool import Spool
from fedscan_core.errors import ConfigError, DataError

# Status codes of C-STORE: PS3.4 table B.2-1 and PS3.7 annex C.
SUCCESS, NOT_UNDERSTOOD, OUT_OF_RESOURCES, PROCESSING_FAILURE = 0x0000, 0xC000, 0xA700, 0x0110
_VERIFICATION = "1.2.840.10008.1.1"  # C-ECHO
# Storage SOP classes (PS3.4 annex B.5), and the retired ones of images that old archives still send: ultrasound (also
# multi-frame), nuclear medicine, biplane angiography, visible light.
_RETIRED = tuple(f"1.2.840.10008.5.1.4.1.1.{number}" for number in ("3", "5", "6", "12.3", "77.1", "77.2"))
STORAGE = (*(str(context.abstract_syntax) for context in AllStoragePresentationContexts), *_RETIRED)
for _uid in _RETIRED:  # pynetdicom would not know what to do with them
    register_uid(_uid, "RetiredImageStorage" + _uid.replace(".", "_"), StorageServiceClass)
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass
class Received:
    """What an SCP has done so far, by `COUNTED`; counted from several threads."""

    counts: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, what: str) -> None:
        """One more."""
        with self.lock:
            self.counts[what] += 1


COUNTED = {
    "stored": "stored",
    "same": "sent again, unchanged",
    "conflict": "sent again with another content: the first stays",
    "full": "refused because the disk is full",
    "failed": "refused because they could not be stored",
    "stranger": "connections and associations refused: address, AE title or certificate",
}


def serve(settings: DimseStore, spool: Spool, *, stop: threading.Event, watch: Callable[[Counter[str]], None]) -> None:
    """Receives until `stop` is set; `watch` is told the counts (keys of `COUNTED`) now and then.

    Raises:
        ConfigError: the address and port cannot be listened on, or a certificate cannot be used.
    """
    received = Received()
    with listening(settings, spool, received):
        while not stop.wait(0.2):
            watch(Counter(received.counts))
    watch(Counter(received.counts))


@contextlib.contextmanager
def listening(
    settings: DimseStore, spool: Spool, received: Received, on_store: Callable[[], None] = lambda: None
) -> Iterator[int]:
    """An SCP that runs while the context lasts; gives the port it listens on.

    On leaving, associations are aborted: the sender has no answer for an object in transit and keeps it.
    """
    quiet()
    allowed = [(peer.ae_title, peer.address) for peer in settings.allow]
    context = server_context(settings.tls) if settings.tls else None
    ae = AE(settings.ae_title)
    ae.require_called_aet = True
    ae.require_calling_aet = sorted({title for title, _ in allowed})
    ae.maximum_associations = settings.max_associations
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = settings.timeout_seconds
    ae.maximum_pdu_size = 1 << 17
    ae.supported_contexts = _contexts()

    def requested(event: Any) -> None:
        address = _address(event.assoc.requestor.address_info.address)
        title = event.assoc.requestor.primitive.calling_ae_title.strip()
        if not any(title == name and address in network for name, network in allowed):
            event.assoc.acse.send_reject(0x01, 0x01, 0x03)  # permanent, by the user, calling AE title not recognized
            received.count("stranger")
            event.assoc.kill()

    def rejected(event: Any) -> None:
        received.count("stranger")

    handlers: list[Any] = [
        (evt.EVT_REQUESTED, requested),
        (evt.EVT_REJECTED, rejected),
        (evt.EVT_C_STORE, storing(spool, received, on_store)),
    ]
    try:
        server = ae.make_server(
            (settings.listen_address, settings.listen_port),
            ssl_context=context,
            evt_handlers=handlers,
            server_class=_server_class([network for _, network in allowed], settings.timeout_seconds, received),
        )
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "not an address"
        raise ConfigError(
            f"Cannot listen on {settings.listen_address}, port {settings.listen_port} ({reason}).",
            remedy="Check listen_address and listen_port, and that no other program listens there.",
        ) from None
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
    thread.start()
    try:
        yield int(server.server_address[1])
    finally:
        server.shutdown()
        for association in server.active_associations:
            association.abort()
        thread.join()


@functools.cache
def _contexts() -> list[PresentationContext]:
    """Every SOP class of `STORAGE` in every transfer syntax, and C-ECHO."""
    contexts: list[PresentationContext] = []
    for uid in (_VERIFICATION, *STORAGE):
        context = _Context()
        context.abstract_syntax = UID(uid)
        context.transfer_syntax = list(DEFAULT_TRANSFER_SYNTAXES if uid == _VERIFICATION else AllTransferSyntaxes)
        contexts.append(context)
    return contexts


class _Context(PresentationContext):
    """Is copied for each association, which takes a tenth of a second for all of them the ordinary way."""

    def __deepcopy__(self, memo: object) -> Self:
        return copy.copy(self)


def storing(spool: Spool, received: Received, on_store: Callable[[], None]) -> Callable[[Any], int]:
    """The handler of C-STORE: into the spool, and the status to answer."""

    def store(event: Any) -> int:
        try:
            with event.request.DataSet.getbuffer() as data:
                head = b"\0" * 128 + b"DICM" + encode_file_meta(event.file_meta)
                outcome = spools.put(spool.folder, spool.key, [head, data], str(event.request.AffectedSOPInstanceUID))
        except OSError as error:
            full = error.errno in _FULL
            received.count("full" if full else "failed")
            return OUT_OF_RESOURCES if full else PROCESSING_FAILURE
        except DataError:
            received.count("failed")
            return NOT_UNDERSTOOD
        except Exception:  # anything else would be logged with its text, which may hold identifiers
            received.count("failed")
            return PROCESSING_FAILURE
        received.count(outcome)
        on_store()
        return SUCCESS

    return store


def server_context(tls: Tls) -> ssl.SSLContext:
    """TLS that demands a certificate of the other side which our CA signed.

    Raises:
        ConfigError: a file is absent, is no PEM, or certificate and key do not belong together.
    """
    return _context(tls, ssl.PROTOCOL_TLS_SERVER)


def client_context(tls: Tls) -> ssl.SSLContext:
    """TLS that shows our certificate and checks the other side's, its host name included.

    Raises:
        ConfigError: as `server_context`.
    """
    return _context(tls, ssl.PROTOCOL_TLS_CLIENT)


def _context(tls: Tls, protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_verify_locations(tls.ca_file)
        context.load_cert_chain(tls.certificate, tls.key, password=_no_password(tls.key))
    except (OSError, ValueError):  # SSLError is an OSError
        raise ConfigError(
            "The certificates of [tls] cannot be used.",
            remedy="ca_file, certificate and key are PEM files, the key without a password and belonging to the "
            "certificate.",
        ) from None
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def _no_password(path: Path) -> Callable[[], str]:
    """In place of OpenSSL's question on the terminal, which an agent would wait for until the end of days."""

    def refuse() -> str:
        raise ValueError(f"{path} has a password")

    return refuse


def _address(text: str) -> Any:
    address = ip_address(text.partition("%")[0])
    return getattr(address, "ipv4_mapped", None) or address


def _server_class(networks: Sequence[Any], timeout: float, received: Received) -> type[ThreadedAssociationServer]:
    """The server of pynetdicom, with the address looked at first and the TLS handshake out of the accepting thread."""

    class Server(ThreadedAssociationServer):
        daemon_threads = True

        def get_request(self) -> tuple[socket, Any]:
            assert self.socket is not None
            connection, address = self.socket.accept()
            connection.settimeout(timeout)
            connection.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1)
            return connection, address

        def verify_request(self, request: Any, client_address: Any) -> bool:
            if any(_address(client_address[0]) in network for network in networks):
                return True
            received.count("stranger")
            return False

        def finish_request(self, request: Any, client_address: Any) -> None:
            if self.ssl_context:
                try:
                    request = self.ssl_context.wrap_socket(request, server_side=True)
                except OSError:  # SSLError and timeouts too
                    received.count("stranger")
                    request.close()
                    return
            super().finish_request(request, client_address)

        def shutdown(self) -> None:
            BaseServer.shutdown(self)
            self.server_close()

        def handle_error(self, request: Any, client_address: Any) -> None:
            received.count("failed")  # and no traceback on the terminal

    return Server
