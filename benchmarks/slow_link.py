"""A link with a set one-way delay: two network namespaces, a TUN device in each, and a program between them.

    sudo .venv/bin/python benchmarks/slow_link.py        what `open_link` starts; it ends when its standard input does

Each packet read from one device is held back until its time has come and then written to the other. The program
runs at real-time priority where it may, so that a busy machine does not lengthen the delay. The namespaces have
no names and no other way out: they are gone when the last process in them is.
"""

import ctypes
import fcntl
import os
import select
import struct
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass

ADDRESSES = ("10.77.0.1", "10.77.0.2")
DEVICE = "slow0"  # in each namespace
MTU = 9000
CLONE_NEWNET = 0x40000000
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
DELAY = struct.Struct("d")  # seconds, as written to the program's standard input


@dataclass(frozen=True)
class Link:
    process: subprocess.Popen
    namespaces: tuple[str, str]  # files that name them, for nsenter
    realtime: bool

    @property
    def control(self) -> int:
        """Return the file descriptor that takes the delay."""
        assert self.process.stdin is not None
        return self.process.stdin.fileno()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()


def open_link() -> Link | str:
    """Open two joined namespaces, the delay zero at first; return one sentence on why where there cannot be any."""
    process = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    )
    assert process.stdout is not None and process.stderr is not None
    said = process.stdout.readline().split()
    if not said:
        process.wait()
        why = process.stderr.read().decode().strip().splitlines()
        return f"no link with a delay can be made here ({why[-1] if why else 'it said nothing'})"
    first, second, realtime = (int(word) for word in said)
    return Link(process, (f"/proc/{process.pid}/fd/{first}", f"/proc/{process.pid}/fd/{second}"), bool(realtime))


def set_delay(control: int, seconds: float) -> None:
    """Set the delay of packets sent from now on."""
    os.write(control, DELAY.pack(seconds))


def _main() -> None:
    namespaces, devices = [], []
    for own, other in (ADDRESSES, ADDRESSES[::-1]):
        if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "unshare: " + os.strerror(ctypes.get_errno()))
        namespaces.append(os.open("/proc/self/ns/net", os.O_RDONLY))
        devices.append(_tun(own, other))
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))
        realtime = 1
    except OSError:
        realtime = 0
    print(*namespaces, realtime, flush=True)
    _carry(devices, sys.stdin.fileno())


def _tun(own: str, other: str) -> int:
    """Make a TUN device in this namespace with the address `own`, at whose far end is `other`."""
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), IFF_TUN | IFF_NO_PI))
    for arguments in (
        "link set lo up",
        f"link set {DEVICE} mtu {MTU} addrgenmode none up",
        f"address add {own} peer {other} dev {DEVICE}",
    ):
        subprocess.run(["ip", *arguments.split()], check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    return tun


def _carry(devices: list[int], control: int) -> None:
    """Hold back and pass on, until `control` is closed."""
    delay = 0.0
    held: list[deque[tuple[float, bytes]]] = [deque(), deque()]  # due, packet; by the device it came from
    while True:
        due = [queue[0][0] for queue in held if queue]
        ready = select.select([control, *devices], [], [], max(0.0, min(due) - time.monotonic()) if due else None)[0]
        if control in ready:
            said = os.read(control, DELAY.size)
            if not said:
                return
            delay = DELAY.unpack(said)[0]
        for i, device in enumerate(devices):
            if device in ready:
                while packet := _read(device):
                    held[i].append((time.monotonic() + delay, packet))
            while held[i] and held[i][0][0] <= time.monotonic():
                os.write(devices[1 - i], held[i].popleft()[1])


def _read(device: int) -> bytes:
    try:
        return os.read(device, MTU)
    except BlockingIOError:
        return b""


if __name__ == "__main__":
    _main()
