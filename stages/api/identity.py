"""A digest of what a callable computes, so that a step runs again if its function in memory has changed.

It covers the code of a function, its default values, the values that it captures, and the global constants, functions and classes that it
uses. For an object (also a bound method or ``functools.partial``) it covers the class and the state. Files of installed packages count by
name only. It does not depend on comments, formatting or line numbers.
"""

from __future__ import annotations

import dis
import hashlib
import inspect
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType

from stages.registry.contents import file_sha256

PLAIN = (bool, int, float, complex, str, bytes, type(None), type(...))
INSTALLED = tuple(Path(path) for name, path in sysconfig.get_paths().items() if name in ("stdlib", "platstdlib", "purelib", "platlib"))
PACKAGE = Path(__file__).parents[1]


def digest_of(function: Callable[..., object]) -> str:
    """Hex SHA-256 of what ``function`` computes."""
    digest = _Digest()
    digest.add(function)
    return digest.hexdigest()


class _Digest:
    """Hashes values of any kind. A value that occurs again counts by its number, so that cycles end."""

    def __init__(self, seen: dict[int, int] | None = None, kept: list[object] | None = None) -> None:
        self._hashes = hashlib.sha256()
        self._seen: dict[int, int] = {} if seen is None else seen
        self._kept: list[object] = [] if kept is None else kept  # an id is unique only while its object exists

    def hexdigest(self) -> str:
        return self._hashes.hexdigest()

    def _text(self, *texts: object) -> None:
        self._hashes.update("\0".join(map(str, texts)).encode("utf-8", "surrogatepass") + b"\1")

    def add(self, value: object) -> None:
        """Add ``value`` to the digest."""
        if isinstance(value, PLAIN):
            self._text(type(value).__name__, repr(value))
            return
        if id(value) in self._seen:
            self._text("seen", self._seen[id(value)])
            return
        self._seen[id(value)] = len(self._seen)
        self._kept.append(value)
        self._add_new(value)

    def _add_new(self, value: object) -> None:
        if isinstance(value, FunctionType):
            self._function(value)
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, MethodType):
            self._all("method", value.__func__, value.__self__)
        elif isinstance(value, ModuleType):
            self._module(value)
        elif isinstance(value, BuiltinFunctionType):
            self._all("built-in", value.__qualname__, *([] if isinstance(value.__self__, ModuleType) else [value.__self__]))
        elif isinstance(value, CodeType):
            self._code(value)
        elif isinstance(value, staticmethod | classmethod):
            self._all(type(value).__name__, value.__func__)
        elif isinstance(value, property):
            self._all("property", value.fget, value.fset, value.fdel)
        elif isinstance(value, CellType):
            self._all("cell", *_content(value))
        else:
            self._data(value)

    def _all(self, *values: object) -> None:
        for value in values:
            self.add(value)

    def _data(self, value: object) -> None:
        if type(value) in (list, tuple):
            self._text(type(value).__name__, len(value))  # type: ignore[arg-type]
            self._all(*value)  # type: ignore[misc]
        elif type(value) is dict:
            self._text("dict", len(value))
            for key, item in value.items():
                self._all(key, item)
        elif type(value) in (set, frozenset):
            self._text(type(value).__name__, *sorted(map(_digest_alone, value)))  # type: ignore[call-overload]
        elif (content := _array(value)) is not None:
            self._text("array", *content[:-1])
            self._hashes.update(content[-1])
        else:
            self._object(value)

    def _object(self, value: object) -> None:
        """An instance, by its class and by what pickle would store of it."""
        try:
            parts = value.__reduce_ex__(4)
        except Exception:  # a lock, a file, a client: its class counts, and its attributes
            self._all("object", type(value), getattr(value, "__dict__", None))
            return
        if isinstance(parts, str):
            self._all("global", type(value), parts)
            return
        make, arguments, state, items, pairs = (*parts, None, None, None)[:5]
        self._all("object", type(value), make, arguments, state, list(items or ()), list(pairs or ()))

    def _function(self, function: FunctionType) -> None:
        self._text("function", function.__qualname__)
        if _is_installed(function.__module__):
            self._text(function.__module__)
            return
        self._all(function.__code__, function.__defaults__, function.__kwdefaults__, function.__dict__, function.__closure__)
        for name in sorted(_globals_of(function.__code__)):
            if name in function.__globals__:
                self._all(name, function.__globals__[name])

    def _code(self, code: CodeType) -> None:
        self._text("code", code.co_code.hex(), code.co_names, code.co_varnames, code.co_flags)
        self._all(*code.co_consts)

    def _class(self, made: type) -> None:
        self._text("class", made.__qualname__)
        if _is_installed(made.__module__):
            self._text(made.__module__)
            return
        self._all(*made.__bases__)
        for name, member in vars(made).items():
            if name not in ("__dict__", "__weakref__", "__module__", "__doc__", "__firstlineno__", "__static_attributes__"):
                self.add(name)
                if not inspect.isdatadescriptor(member) or isinstance(member, property):
                    self.add(member)

    def _module(self, module: ModuleType) -> None:
        self._text("module", module.__name__)
        file = getattr(module, "__file__", None)
        if file is not None and not _is_installed(module.__name__) and Path(file).is_file():
            self._text(file_sha256(Path(file)))


def _digest_alone(value: object) -> str:
    digest = _Digest()
    digest.add(value)
    return digest.hexdigest()


def _content(cell: CellType) -> list[object]:
    try:
        return [cell.cell_contents]
    except ValueError:  # the variable has no value yet
        return []


def _array(value: object) -> tuple[str, str, bytes] | None:
    """(dtype, shape, bytes) of a tensor or an array; None for anything else. Libraries that are not imported have no objects."""
    torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
    if torch is not None and isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type != "meta":
        flat = value.detach().cpu().contiguous().reshape(-1)
        return str(value.dtype), str(tuple(value.shape)), flat.view(torch.uint8).numpy().tobytes()
    if numpy is not None and isinstance(value, numpy.ndarray | numpy.generic) and not value.dtype.hasobject:
        return str(value.dtype), str(value.shape), value.tobytes()
    return None


def _globals_of(code: CodeType) -> set[str]:
    """The global names that the code reads, also in functions inside it, without those that it assigns (for example a counter)."""
    read: set[str] = set()
    assigned: set[str] = set()
    for one in _codes(code):
        for step in dis.get_instructions(one):
            if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                read.add(step.argval)
            elif step.opname == "STORE_GLOBAL":
                assigned.add(step.argval)
    return read - assigned


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _is_installed(name: str | None) -> bool:
    """Whether a module is a part of Python, of this package or of an installed package, as opposed to the user's own file."""
    module = sys.modules.get(name or "")
    if module is None or name == "__main__":
        return False
    file = getattr(module, "__file__", None)
    if file is None:
        return True
    path = Path(file)
    return any(path.is_relative_to(folder) for folder in (*INSTALLED, PACKAGE)) or "site-packages" in path.parts
