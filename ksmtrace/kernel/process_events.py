"""Process life-cycle events over the kernel's connector, and taskstats; the one user of pyroute2.

pyroute2 is imported inside the functions: it takes 0.17 s.
"""

from __future__ import annotations

import errno
import os
import random
import select
import struct
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from ksmtrace.errors import KernelFeatureMissing, KernelInterfaceError, PrivilegeMissing

if TYPE_CHECKING:
    import socket

RECEIVE_BUFFER_BYTES = 16 << 20
"""Some 20,000 events: the kernel charges about 800 bytes for a message of 76."""

_ANSWER_SECONDS = 1.0
_SO_RCVBUF, _SO_RCVBUFFORCE, _SOL_SOCKET = 8, 33, 1


class ProcessEvent(NamedTuple):
    """One event in a process's life.

    Attributes:
        kind: ``fork``, ``exec``, ``exit`` or ``comm``.
        ts_ns: CLOCK_MONOTONIC, stamped by the kernel (drivers/connector/cn_proc.c).
        pid: tgid in the initial pid namespace; the child's for ``fork``.
        ppid: the parent's tgid for ``fork``, else None.
        comm: the new name for ``comm``, else None.
    """

    kind: str
    ts_ns: int
    pid: int
    ppid: int | None
    comm: str | None


class ProcessEvents:
    """A subscription to the kernel's process events (CONFIG_PROC_EVENTS).

    Only thread-group leaders are reported. An ``exit`` is the leader's: a process whose leader
    ends before its other threads lives on after it.

    Attributes:
        lost: times that the kernel found the receive buffer full; each stands for one event or
            more that was dropped.
    """

    def __init__(self) -> None:
        self.lost = 0
        self._subscription: Any = None
        self._socket: socket.socket | None = None
        self._layouts: dict[int, tuple[str, struct.Struct]] = {}
        self._head = struct.Struct("")

    def open(self) -> None:
        """Subscribe, and wait for the kernel's answer.

        Raises:
            PrivilegeMissing: not permitted here (CAP_NET_ADMIN in the initial namespaces).
            KernelFeatureMissing: the kernel has no connector or no process events.
        """
        from pyroute2.netlink.connector import cn_proc

        try:
            subscription = cn_proc.ProcEventSocket()
        except OSError as error:
            raise _refusal(error) from error
        try:
            self._subscribe(cn_proc, subscription)
        except OSError as error:
            subscription.close()
            raise _refusal(error) from error
        except BaseException:
            subscription.close()
            raise
        self._subscription = subscription

    def _subscribe(self, cn_proc: Any, subscription: Any) -> None:
        # bind() of pyroute2 hides why it failed (KeyError after 180 ports), so try the right first.
        raw: socket.socket = subscription.asyncore.socket
        try:
            raw.setsockopt(_SOL_SOCKET, _SO_RCVBUFFORCE, RECEIVE_BUFFER_BYTES)
        except PermissionError:
            raw.setsockopt(_SOL_SOCKET, _SO_RCVBUF, RECEIVE_BUFFER_BYTES)
        try:
            subscription.bind()
        except KeyError:
            raise PermissionError(errno.EPERM, "bind") from None
        # Past this point the socket is read directly: pyroute2's own reader blocks, and decodes
        # a message in 30 µs where one struct takes 1 µs. The layouts remain pyroute2's.
        raw.setblocking(False)
        self._socket = raw
        self._head = _layout(cn_proc.proc_event_base)
        self._layouts = {
            cn_proc.PROC_EVENT_FORK: ("fork", _layout(cn_proc.proc_event_fork)),
            cn_proc.PROC_EVENT_EXEC: ("exec", _layout(cn_proc.proc_event_exec)),
            cn_proc.PROC_EVENT_COMM: ("comm", _layout(cn_proc.proc_event_comm)),
            cn_proc.PROC_EVENT_EXIT: ("exit", _layout(cn_proc.proc_event_exit)),
        }
        self._ask(cn_proc, cn_proc.PROC_CN_MCAST_LISTEN)

    def _ask(self, cn_proc: Any, action: int) -> None:
        assert self._socket is not None
        request = cn_proc.proc_event_control()
        token = random.getrandbits(31)
        request["idx"], request["val"] = cn_proc.CN_IDX_PROC, cn_proc.CN_VAL_PROC
        request["ack"], request["len"], request["action"] = token, 4, action
        request["header"]["type"], request["header"]["flags"] = 3, 0  # NLMSG_DONE
        request["header"]["pid"] = self._socket.getsockname()[0]
        request.encode()
        self._socket.sendto(bytes(request.data), (0, 0))
        # A kernel without CONFIG_PROC_EVENTS takes the request and never answers.
        deadline = time.monotonic() + _ANSWER_SECONDS
        while (left := deadline - time.monotonic()) > 0:
            select.select([self._socket], [], [], left)
            while (message := self._receive()) is not None:
                _, _, _, ack, _, _, what, _, _ = self._head.unpack_from(message, 16)
                if what == cn_proc.PROC_EVENT_NONE and ack == token + 1:
                    (code,) = struct.unpack_from("=I", message, 16 + self._head.size)
                    if code:
                        raise OSError(code, os.strerror(code))
                    return
        raise KernelFeatureMissing(
            "the kernel does not answer on its process connector",
            "boot a kernel with CONFIG_PROC_EVENTS=y",
        )

    def fileno(self) -> int:
        """Return the socket's descriptor, readable when there are events."""
        assert self._socket is not None
        return self._socket.fileno()

    def drain(self) -> list[ProcessEvent]:
        """Return every event that has arrived, in order; never blocks.

        Counts in :attr:`lost` what the kernel had to drop.
        """
        events = []
        while (message := self._receive()) is not None:
            event = self._decode(message)
            if event is not None:
                events.append(event)
        return events

    def _receive(self) -> bytes | None:
        assert self._socket is not None
        while True:
            try:
                message = self._socket.recv(4096)
            except BlockingIOError:
                return None
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise KernelInterfaceError(
                        f"the process connector failed: {error.strerror}"
                    ) from error
                self.lost += 1
                continue
            if len(message) >= 16 + self._head.size:
                return message

    def _decode(self, message: bytes) -> ProcessEvent | None:
        # struct nlmsghdr (16 bytes), struct cn_msg and struct proc_event's head, then the event.
        what, _, ts_ns = self._head.unpack_from(message, 16)[6:]
        kind, layout = self._layouts.get(what, (None, None))
        if kind is None or layout is None or len(message) < 16 + layout.size:
            return None
        body = layout.unpack_from(message, 16)[9:]
        if kind == "fork":
            _, ppid, tid, pid = body
            return ProcessEvent(kind, ts_ns, pid, ppid, None) if tid == pid else None
        tid, pid = body[:2]
        if tid != pid:
            return None
        comm = body[2].partition(b"\0")[0].decode(errors="replace") if kind == "comm" else None
        return ProcessEvent(kind, ts_ns, pid, None, comm)

    def close(self) -> None:
        """End the subscription; the kernel ends its part with the socket."""
        if self._subscription is not None:
            self._subscription.close()
            self._subscription = self._socket = None


# The fields as pyroute2 declares them, in the kernel's order and without padding.
def _layout(message_class: Any) -> struct.Struct:
    return struct.Struct("=" + "".join(form for _, form in message_class.fields))


def _refusal(error: OSError) -> PrivilegeMissing | KernelFeatureMissing:
    name = errno.errorcode.get(error.errno or 0, str(error.errno))
    if error.errno in (errno.EPERM, errno.EACCES):
        return PrivilegeMissing(
            f"process events are not permitted here: {name}",
            "run as root in the initial user, pid and network namespaces",
        )
    return KernelFeatureMissing(
        f"the kernel has no process connector: {name}",
        "boot a kernel with CONFIG_CONNECTOR=y and CONFIG_PROC_EVENTS=y",
    )


_ATTRIBUTE_HEAD_BYTES = 4  # struct nlattr
_TASKSTATS_KEYS = {
    "cpu_count": "cpu_count",
    "cpu_delay_total": "cpu_delay_total_ns",
    "cpu_run_real_total": "cpu_run_real_total_ns",
    "cpu_run_virtual_total": "cpu_run_virtual_total_ns",
    "nvcsw": "nvcsw",
    "nivcsw": "nivcsw",
}


def read_taskstats(pid: int) -> dict[str, int] | None:
    """Read a task's accounting over the taskstats netlink family.

    Returns:
        ``cpu_count`` (times put on a CPU), ``cpu_delay_total_ns`` (waiting for one),
        ``cpu_run_virtual_total_ns`` (se.sum_exec_runtime), ``cpu_run_real_total_ns`` (utime and
        stime: 0 where only ticks are accounted and none hit), ``nvcsw``, ``nivcsw`` (context
        switches), since the task began (kernel/taskstats.c, kernel/delayacct.c). None where the
        task is gone, the kernel lacks CONFIG_TASKSTATS, this user may not (CAP_NET_ADMIN), or
        the answer's layout is not one that pyroute2 knows.
    """
    from pyroute2 import TaskStats
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        with TaskStats() as taskstats:
            taskstats.bind()
            (answer,) = taskstats.get_pid_stat(pid)
    except (NetlinkError, OSError, ValueError):
        return None
    aggregate = answer.get_attr("TASKSTATS_TYPE_AGGR_PID")
    stats = aggregate.get_attr("TASKSTATS_TYPE_STATS") if aggregate is not None else None
    # Version 15 of the struct was laid out differently; a wrong layout does not find the pid.
    if stats is None or stats["ac_pid"] != pid:
        return None
    return {key: stats[field] for field, key in _TASKSTATS_KEYS.items() if field in stats}


class CopyDelays:
    """Asks how long processes were delayed by copies on write, over the taskstats netlink family.

    The kernel's delay accounting counts every call of mm/memory.c:wp_page_copy, of KSM pages and
    others, by tasks that began while kernel.task_delayacct was 1 (kernel/delayacct.c). pyroute2's
    record of the struct ends before these members, so they are read by their offsets.

    Args:
        count_offset: offset of taskstats.wpcopy_count, from BTF.
        delay_offset: offset of taskstats.wpcopy_delay_total, from BTF.

    Raises:
        KernelFeatureMissing: no CONFIG_TASKSTATS, or not permitted (CAP_NET_ADMIN).
    """

    def __init__(self, count_offset: int, delay_offset: int) -> None:
        from pyroute2 import TaskStats
        from pyroute2.netlink.exceptions import NetlinkError

        self._offsets = count_offset, delay_offset
        self._socket = TaskStats()
        try:
            self._socket.bind()
        except (NetlinkError, OSError) as error:
            self._socket.close()
            raise KernelFeatureMissing(
                f"taskstats cannot be asked for: {error}",
                "run as root, on a kernel with CONFIG_TASKSTATS=y and CONFIG_TASK_DELAY_ACCT=y",
            ) from error

    def read(self, pid: int) -> dict[str, int] | None:
        """Read the delays of a process's living threads, together.

        Returns:
            ``wpcopy_count`` and ``wpcopy_delay_ns``, since the threads began; None where the
            process is gone.
        """
        from pyroute2.netlink import NLM_F_REQUEST, taskstats
        from pyroute2.netlink.exceptions import NetlinkError

        request = taskstats.tcmd()
        request["cmd"], request["version"] = taskstats.TASKSTATS_CMD_GET, 1
        request["attrs"].append(["TASKSTATS_CMD_ATTR_TGID", pid])
        try:
            (answer,) = self._socket.nlm_request(
                request, msg_type=self._socket.prid, msg_flags=NLM_F_REQUEST
            )
        except (NetlinkError, OSError, ValueError):
            return None
        aggregate = answer.get_attr("TASKSTATS_TYPE_AGGR_TGID")
        stats = aggregate.get_attr("TASKSTATS_TYPE_STATS") if aggregate is not None else None
        if stats is None:
            return None
        content = stats.data[stats.offset + _ATTRIBUTE_HEAD_BYTES : stats.offset + stats.length]
        if len(content) < max(self._offsets) + 8:
            return None
        count, delay_ns = (struct.unpack_from("=Q", content, at)[0] for at in self._offsets)
        return {"wpcopy_count": count, "wpcopy_delay_ns": delay_ns}

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()
