"""Notes every destination of TCP and UDP that leaves this network namespace, or asks a resolver on loopback.

python sniff.py FILE        one line "PROTOCOL ADDRESS PORT" for each new destination; needs root (AF_PACKET)
"""

import socket
import struct
import sys

ETH_P_ALL, OUTGOING = 3, 4
PROTOCOLS = {6: "tcp", 17: "udp"}


def main() -> None:
    """Runs until it is killed."""
    seen = set()
    with (
        socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_ALL)) as packets,
        open(sys.argv[1], "a", buffering=1, encoding="ascii") as file,
    ):
        print("ready", file=file)
        while True:
            data, (device, _, kind, *_) = packets.recvfrom(2048)
            if len(data) < 24 or data[0] >> 4 != 4 or data[9] not in PROTOCOLS:
                continue
            port = struct.unpack("!H", data[(at := (data[0] & 15) * 4) + 2 : at + 4])[0]
            if (device == "lo" and port != 53) or (device != "lo" and kind != OUTGOING):
                continue
            line = f"{PROTOCOLS[data[9]]} {socket.inet_ntoa(data[16:20])} {port}"
            if line not in seen:
                seen.add(line)
                print(line, file=file)


if __name__ == "__main__":
    main()
