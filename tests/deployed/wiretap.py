"""What a tap kept, as requests: HTTP/1.1 taken apart, Flower's protobuf read, arrays and records inflated."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from flwr.proto import fleet_pb2, message_pb2


@dataclass(frozen=True)
class Sent:
    """One request from an agent."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


def requests(stream: bytes) -> Iterator[Sent]:
    """The requests of one connection, in order; a last one that was cut off is left out."""
    at = 0
    while (end := stream.find(b"\r\n\r\n", at)) >= 0:
        head = stream[at:end].decode("latin-1").split("\r\n")
        method, path, _ = head[0].split(" ")
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
        at = end + 4
        if headers.get("transfer-encoding", "").lower() == "chunked":
            body = bytearray()
            while True:
                line = stream.find(b"\r\n", at)
                if line < 0:
                    return
                size = int(stream[at:line].split(b";")[0], 16)
                body += stream[line + 2 : line + 2 + size]
                at = line + 2 + size + 2
                if size == 0:
                    break
        else:
            size = int(headers.get("content-length", "0"))
            body = bytearray(stream[at : at + size])
            at += size
            if len(body) < size:
                return
        yield Sent(method, path, headers, bytes(body))


def pushed(sent: Sent) -> fleet_pb2.PushMessagesRequest | None:
    """The reply whose parts follow as objects, if this request announces one."""
    return fleet_pb2.PushMessagesRequest.FromString(sent.body) if sent.path == "/v1/fleet/push-messages" else None


def object_of(sent: Sent) -> tuple[str, bytes] | None:
    """(id, content) of an object, if this request carries one."""
    if sent.path != "/v1/fleet/push-object":
        return None
    request = message_pb2.PushObjectRequest.FromString(sent.body)
    return request.object_id, request.object_content


def json_of(sent: Sent) -> dict[str, Any] | None:
    """The body of a request to our own door."""
    told: dict[str, Any] | None = json.loads(sent.body or b"{}") if sent.path.startswith("/fedscan/") else None
    return told
