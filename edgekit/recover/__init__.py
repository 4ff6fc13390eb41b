"""How a rewritten network wins back what it lost.

edgekit.recover.recover(student, teacher, feeds, settings)    trains the student's weights towards the teacher, without labels
edgekit.recover.Settings                                      how
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgekit.recover.settings import Progress, Recovered, Settings

if TYPE_CHECKING:
    from edgekit.recover.driver import recover

__all__ = ["Progress", "Recovered", "Settings", "recover"]


def __getattr__(name: str) -> Any:
    # Lazy, since it loads torch.
    if name == "recover":
        from edgekit.recover.driver import recover

        return recover
    raise AttributeError(f"module 'edgekit.recover' has no attribute '{name}'")
