"""What parts share that one guardian holds from beginning to end."""

from __future__ import annotations

from offload.quiescers.holder import Holder


class GuardedPart:
    """Arms, thaws and closes its Holder, and keeps what became known of a break."""

    image_at = None

    def __init__(self, name: str, holder: Holder) -> None:
        self.name = name
        self._holder = holder
        self._frozen = False
        self._notes: list[str] = []
        self.what: tuple[str, ...] = ()
        self.unbroken = True

    def arm(self, deadline_s: float) -> None:
        """Start the guardian, which opens what it needs."""
        self._holder.arm(deadline_s)

    def _break(self, why: str) -> None:
        if self.unbroken:
            self._notes.append(f"not held all the time: {why}")
        self.unbroken = False

    def thaw(self) -> None:
        """Let go. Idempotent. Raises UnavailableError (`thaw-failed`)."""
        if not self._frozen:
            return
        self._frozen = False
        try:
            self._holder.thaw()
        finally:
            if self._holder.broken:
                self._break(self._holder.broken)

    def close(self) -> None:
        """End the guardian, which lets go if that is due still."""
        self._holder.close()
