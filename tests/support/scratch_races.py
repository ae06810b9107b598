"""Finds data races of a Triton kernel in Triton's interpreter, which runs a program's threads in order and hides them.

Between two barriers the threads of a program run in any order. So whatever one of them writes, no other may read or
write before the next barrier. This asks for a little more: no address at all is touched again after it was written,
nor written after it was read, except by atomics among themselves.
"""

from __future__ import annotations

from unittest.mock import patch

import numpy as np


class Recorder:
    """Addresses that were read, written and updated since the last barrier, and the races among them."""

    def __init__(self):
        self.races = []
        self.forget()

    def forget(self):
        self.read, self.written, self.updated = set(), set(), set()

    def see(self, what, pointers, mask):
        addresses = np.broadcast_to(pointers.data, np.shape(mask.data))[np.broadcast_to(mask.data, np.shape(mask.data))]
        touched = set(addresses.ravel().tolist())
        if what == "write" and len(touched) < addresses.size:
            self.races.append("two lanes write to one address")
        conflicts = {
            "read": {"written": self.written, "updated": self.updated},
            "write": {"read": self.read, "written": self.written, "updated": self.updated},
            "update": {"read": self.read, "written": self.written},
        }[what]
        self.races += [
            f"{what} of what was {how}" for how, before in conflicts.items() if not before.isdisjoint(touched)
        ]
        {"read": self.read, "write": self.written, "update": self.updated}[what].update(touched)


def find_races(solve, *arguments, barriers=True):
    """Run ``solve(*arguments)`` in this process, an interpreting one; kinds of races seen.

    Without `barriers`, those of the kernel are ignored.
    """
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    recorder = Recorder()

    def watched(name, what, mask_position):
        original = getattr(Builder, name)

        def call(self, *arguments):
            pointers = arguments[1 if what == "update" else 0]
            recorder.see(what, pointers, arguments[mask_position])
            return original(self, *arguments)

        return patch.object(Builder, name, call)

    set_program = Builder.set_grid_idx

    def next_program(self, *index):
        recorder.forget()  # programs share no scratch
        set_program(self, *index)

    def barrier(self):
        if barriers:
            recorder.forget()

    with (
        watched("create_masked_load", "read", 1),
        watched("create_masked_store", "write", 2),
        watched("create_atomic_rmw", "update", 3),
        patch.object(Builder, "set_grid_idx", next_program),
        patch.object(Builder, "create_barrier", barrier),
    ):
        solve(*arguments)
    return sorted(set(recorder.races))
