"""Reads pickles as plain values: calls only known functions, and bounds memory by the file.

Python's own unpickler is unsafe for untrusted pickles, even with restricted classes: it believes the length
of a name, a memo index or an array before it checks it (86 bytes took 1.9 GB), it may set a state on any
object it knows, including classes of the process, and it hashes keys of any depth. This parser reads only the
opcodes that state dicts need. Format: the comments of Python's ``pickletools``,
https://docs.python.org/3/library/pickletools.html
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Iterable
from pickle import UnpicklingError
from typing import IO, Any

MAX_PICKLE_BYTES = 200_000_000
MAX_LINE_BYTES = 1_000
"""Longest name of a module or of something in it."""


class AllowedGlobal:
    """A function that a pickle may call. A pickle cannot create one from its own values."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call


class PickledObject:
    """An object of a class that is known by its name alone: what it was made from, and its state.

    Nothing of the class is run or imported. As a key of a dict it is equal to itself only.
    """

    __slots__ = ("arguments", "name", "state")

    def __init__(self, name: str, arguments: tuple[Any, ...]) -> None:
        self.name = name
        self.arguments = arguments
        self.state: Any = None

    def fields(self) -> dict[Any, Any]:
        """The attributes in the state: a dict, or one of attributes and one of slots."""
        parts = self.state if isinstance(self.state, tuple) and len(self.state) == 2 else (self.state,)
        found: dict[Any, Any] = {}
        for part in parts:
            if isinstance(part, dict):
                found |= part
        return found


class PickledClass(AllowedGlobal):
    """A class whose objects are read as :class:`PickledObject`."""

    def __init__(self, name: str) -> None:
        super().__init__(lambda *arguments: PickledObject(name, arguments))
        self.name = name


class Unpickler:
    """Reads one pickle from the current position of ``file``, which has ``size`` bytes. ``find`` resolves a
    name, ``persistent`` an identifier, and ``build`` applies a state to an object. Errors: UnpicklingError,
    and what these functions raise."""

    def __init__(
        self,
        file: IO[bytes],
        size: int,
        find: Callable[[str, str], Any],
        persistent: Callable[[Any], Any],
        build: Callable[[Any, Any], None],
    ) -> None:
        self._file = file
        self._left = min(size - file.tell(), MAX_PICKLE_BYTES)
        self._find = find
        self._persistent = persistent
        self._state = build
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def load(self) -> Any:
        """Return the value. Does not read past it."""
        while (opcode := self._read(1)) != pickle.STOP:
            step = STEPS.get(opcode)
            if step is None:
                raise UnpicklingError(f"the opcode {opcode!r}, which state dicts do not use")
            step(self)
        return self._stack.pop()

    def _read(self, count: int) -> bytes:
        """Read ``count`` bytes; checks that the file has them before it allocates memory."""
        self._left -= count
        data = self._file.read(count) if self._left >= 0 else b""
        if len(data) < count:
            raise UnpicklingError("it ends too early")
        return data

    def _number(self, form: str) -> int:
        number: int = struct.unpack(form, self._read(struct.calcsize(form)))[0]
        return number

    def _line(self) -> str:
        data = self._file.readline(MAX_LINE_BYTES)
        self._left -= len(data)
        if not data.endswith(b"\n"):
            raise UnpicklingError("an unterminated name")
        return data[:-1].decode("utf-8")

    def _since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marked.pop()
        return items

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _mark(self) -> None:
        self._marked.append(self._stack)
        self._stack = []

    def _pop(self) -> None:
        self._stack.pop()

    def _pop_mark(self) -> None:
        self._since_mark()

    def _protocol(self) -> None:
        self._read(1)

    def _frame(self) -> None:
        self._read(8)

    def _text(self, form: str) -> None:
        self._push(str(self._read(self._number(form)), "utf-8", "surrogatepass"))

    def _old_text(self, form: str) -> None:
        """Text of Python 2: bytes that are mostly ASCII."""
        self._push(str(self._read(self._number(form)), "utf-8"))

    def _bytes(self, form: str) -> None:
        self._push(self._read(self._number(form)))

    def _long(self) -> None:
        self._push(int.from_bytes(self._read(self._number("<B")), "little", signed=True))

    def _tuple(self, count: int) -> None:
        if len(self._stack) < count:
            raise UnpicklingError("a tuple with too few values")
        items = tuple(self._stack[len(self._stack) - count :])
        del self._stack[len(self._stack) - count :]
        self._push(items)

    def _marked_tuple(self) -> None:
        self._push(tuple(self._since_mark()))

    def _append(self, items: Iterable[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, list):
            raise UnpicklingError("a list was expected")
        target.extend(items)

    def _set(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise UnpicklingError("a dict and pairs for it were expected")
        put_pairs(target, zip(items[::2], items[1::2], strict=True))

    def _set_one(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set([key, value])

    def _put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def _get(self, index: int) -> None:
        self._push(self._memo[index])

    def _global(self) -> None:
        module = self._line()
        self._push(self._find(module, self._line()))

    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise UnpicklingError("a name that is not text")
        self._push(self._find(module, name))

    def _reduce(self) -> None:
        arguments, callee = self._stack.pop(), self._stack.pop()
        if not isinstance(callee, AllowedGlobal) or not isinstance(arguments, tuple):
            raise UnpicklingError("a call of something that is not an allowed name")
        self._push(callee.call(*arguments))

    def _build(self) -> None:
        state = self._stack.pop()
        self._state(self._stack[-1], state)

    def _persistent_id(self) -> None:
        self._push(self._persistent(self._stack.pop()))


def put_pairs(target: dict[Any, Any], pairs: Iterable[tuple[Any, Any]]) -> None:
    """Add pairs to a dict. Keys are plain, or objects known by name, which are equal to themselves only: hashing nested
    tuples that share members takes exponential time."""
    for key, value in pairs:
        if not isinstance(key, (str, bytes, int, float, type(None), PickledObject)):
            raise UnpicklingError(f"a key of the type {type(key).__name__}")
        target[key] = value


STEPS: dict[bytes, Callable[[Unpickler], None]] = {
    pickle.PROTO: Unpickler._protocol,
    pickle.FRAME: Unpickler._frame,
    pickle.MARK: Unpickler._mark,
    pickle.POP: Unpickler._pop,
    pickle.POP_MARK: Unpickler._pop_mark,
    pickle.NONE: lambda u: u._push(None),
    pickle.NEWTRUE: lambda u: u._push(True),
    pickle.NEWFALSE: lambda u: u._push(False),
    pickle.BININT: lambda u: u._push(u._number("<i")),
    pickle.BININT1: lambda u: u._push(u._number("<B")),
    pickle.BININT2: lambda u: u._push(u._number("<H")),
    pickle.LONG1: Unpickler._long,
    pickle.BINFLOAT: lambda u: u._push(u._number(">d")),
    pickle.SHORT_BINUNICODE: lambda u: u._text("<B"),
    pickle.BINUNICODE: lambda u: u._text("<I"),
    pickle.BINUNICODE8: lambda u: u._text("<Q"),
    pickle.SHORT_BINSTRING: lambda u: u._old_text("<B"),
    pickle.BINSTRING: lambda u: u._old_text("<I"),
    pickle.SHORT_BINBYTES: lambda u: u._bytes("<B"),
    pickle.BINBYTES: lambda u: u._bytes("<I"),
    pickle.BINBYTES8: lambda u: u._bytes("<Q"),
    pickle.EMPTY_TUPLE: lambda u: u._push(()),
    pickle.TUPLE1: lambda u: u._tuple(1),
    pickle.TUPLE2: lambda u: u._tuple(2),
    pickle.TUPLE3: lambda u: u._tuple(3),
    pickle.TUPLE: Unpickler._marked_tuple,
    pickle.EMPTY_LIST: lambda u: u._push([]),
    pickle.APPEND: lambda u: u._append([u._stack.pop()]),
    pickle.APPENDS: lambda u: u._append(u._since_mark()),
    pickle.EMPTY_DICT: lambda u: u._push({}),
    pickle.SETITEM: Unpickler._set_one,
    pickle.SETITEMS: lambda u: u._set(u._since_mark()),
    pickle.EMPTY_SET: lambda u: u._push([]),  # a list will do: no tensor is in a set
    pickle.ADDITEMS: lambda u: u._append(u._since_mark()),
    pickle.FROZENSET: lambda u: u._push(u._since_mark()),
    pickle.BINPUT: lambda u: u._put(u._number("<B")),
    pickle.LONG_BINPUT: lambda u: u._put(u._number("<I")),
    pickle.MEMOIZE: lambda u: u._put(len(u._memo)),
    pickle.BINGET: lambda u: u._get(u._number("<B")),
    pickle.LONG_BINGET: lambda u: u._get(u._number("<I")),
    pickle.GLOBAL: Unpickler._global,
    pickle.STACK_GLOBAL: Unpickler._stack_global,
    pickle.REDUCE: Unpickler._reduce,
    pickle.NEWOBJ: Unpickler._reduce,  # an allowed name makes the object, or what stands for it
    pickle.BUILD: Unpickler._build,
    pickle.BINPERSID: Unpickler._persistent_id,
}
"""What each opcode does. Left out are those that create objects with keywords, and those of the text protocols 0
and 1."""
