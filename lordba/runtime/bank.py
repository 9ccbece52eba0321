"""Many adapters over one loaded program: which of them are loaded, who generates with which, and who may come or go."""

import contextlib
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lordba.adapter import Adapter, load_adapter
from lordba.errors import LordbaError
from lordba.runtime.bundle import Bundle, read_bundle
from lordba.runtime.install import install, remove
from lordba.runtime.session import Runner, Session, open_runner

DEFAULT_BUDGET = 64 << 20


class AdapterBank:
    """The adapters of a bundle over its program, loaded once.

        bank = AdapterBank(Path("bundle"))
        with bank.use("shakespeare") as session:
            for token in session.generate(prompt, 32): ...

    Threads may share a bank. The program has one KV cache, so one generation runs at a time and a swap waits for it;
    `install` does not wait, and `remove` waits for those who use that adapter. Loaded adapters are kept, the last used
    first, up to `budget` bytes of their files. A bundle belongs to one bank at a time.
    """

    def __init__(self, bundle: Bundle | Path, *, budget: int = DEFAULT_BUDGET, runner: Runner | None = None) -> None:
        self._bundle = bundle if isinstance(bundle, Bundle) else read_bundle(bundle)
        self._generating = threading.Lock()
        self._generator: int | None = None  # the thread inside `use`
        self._changed = threading.Condition()  # guards the bundle and all that follows
        self._runner = _Keeper(runner or open_runner(self._bundle), budget, self._changed)
        self._users: Counter[str] = Counter()
        self._leaving: set[str] = set()

    @property
    def bundle(self) -> Bundle:
        """The bundle as it is now."""
        return self._bundle

    @property
    def names(self) -> list[str]:
        """The adapters that `use` takes; None, the base alone, comes besides."""
        with self._changed:
            return [adapter.name for adapter in self._bundle.manifest.adapters if adapter.name not in self._leaving]

    @property
    def loaded(self) -> Sequence[str]:
        """The adapters in memory, the last used one last."""
        with self._changed:
            return [name for name in self._runner.kept if name is not None]

    @contextlib.contextmanager
    def use(self, name: str | None) -> Iterator[Session]:
        """A session for one generation with an adapter, or with the base alone (None); it must not outlive the block.

        Waits while another thread generates. Raises LordbaError for an adapter that is not there, and inside a `use` of
        the same thread.
        """
        self._refuse_inside("one generation at a time: leave the session before using another")
        with self._used(name), self._generating:
            self._generator = threading.get_ident()
            try:
                yield Session(self._bundle, name, self._runner)
            finally:
                self._generator = None

    def install(self, name: str, adapter: Adapter | Path) -> None:
        """Add an adapter, given as such or as its folder, or replace the one of that name, for the next `use`.

        The bundle's manifest changes in one step, or, where LordbaError is raised, not at all.
        """
        adapter = load_adapter(adapter) if isinstance(adapter, Path) else adapter
        with self._changed:
            self._become(install(self._bundle, name, adapter, self._runner.write))
            self._runner.forget(name)

    def remove(self, name: str) -> None:
        """Remove an adapter and its file, once nobody uses it any more; from now on nobody can begin to."""
        self._refuse_inside("an adapter cannot be removed from inside a session: leave the session first")
        with self._changed:
            self._check_present(name)
            self._leaving.add(name)
            try:
                self._changed.wait_for(lambda: not self._users[name])
                self._become(remove(self._bundle, name))
                self._runner.forget(name)
            finally:
                self._leaving.discard(name)

    @contextlib.contextmanager
    def _used(self, name: str | None) -> Iterator[None]:
        if name is None:
            yield
            return
        with self._changed:
            self._check_present(name)
            self._users[name] += 1
        try:
            yield
        finally:
            with self._changed:
                self._users[name] -= 1
                self._changed.notify_all()

    def _become(self, bundle: Bundle) -> None:
        self._bundle = self._runner.bundle = bundle

    def _check_present(self, name: str) -> None:
        if name in self._leaving:
            raise LordbaError(f"{self._bundle.folder}: the adapter {name!r} is being removed; use another")
        self._bundle.adapter(name)

    def _refuse_inside(self, what: str) -> None:
        if self._generator == threading.get_ident():
            raise LordbaError(what)


class _Keeper:
    """A Runner that keeps the adapters it has loaded, and swaps only where another one is asked for."""

    def __init__(self, runner: Runner, budget: int, lock: threading.Condition) -> None:
        self._inner = runner
        self._budget = budget
        self._lock = lock  # a file must not be deleted while it is read
        self._current: Any = self  # nothing is in use yet, not even "no adapter"
        self.kept: OrderedDict[str | None, Any] = OrderedDict()
        self.longest = runner.longest

    @property
    def bundle(self) -> Bundle:
        return self._inner.bundle

    @bundle.setter
    def bundle(self, bundle: Bundle) -> None:
        self._inner.bundle = bundle

    def load(self, adapter: str | None) -> Any:
        with self._lock:
            loaded = self.kept[adapter] if adapter in self.kept else self._inner.load(adapter)
            self.kept[adapter] = loaded
            self.kept.move_to_end(adapter)
            sizes = {entry.name: entry.file_bytes for entry in self.bundle.manifest.adapters}
            while sum(sizes.get(name or "", 0) for name in self.kept) > self._budget:
                self.kept.popitem(last=False)  # who uses it holds it still
            return loaded

    def forget(self, name: str) -> None:
        self.kept.pop(name, None)

    def use(self, loaded: Any) -> None:
        if loaded is not self._current:
            self._current = self  # should the swap fail half way
            self._inner.use(loaded)
            self._current = loaded

    def write(self, adapter: Adapter, path: Path) -> None:
        self._inner.write(adapter, path)

    def run(self, tokens: Sequence[int], start: int) -> Any:
        return self._inner.run(tokens, start)
