package ai.lordba.demo.core

import java.util.concurrent.locks.ReentrantLock
import kotlin.concurrent.withLock

/**
 * The adapters of a bundle over its program, loaded once; what `AdapterBank` of lordba/runtime/bank.py is.
 *
 * Threads may share a bank. The program has one KV cache, so one generation runs at a time and a swap waits for it;
 * [install] does not wait, and [remove] waits for those who use that adapter. Loaded adapters are kept, the last used
 * first, up to [budget] bytes of their files.
 */
class AdapterBank(
    bundle: Bundle,
    private val runner: Runner,
    private val budget: Long = DEFAULT_BUDGET,
    private val write: WriteAdapter = ::writeAdapterFile,
) : AutoCloseable {
    private val generating = ReentrantLock()
    private val lock = ReentrantLock() // guards all that follows; never held while tokens run
    private val changed = lock.newCondition()
    private val kept = LinkedHashMap<String?, LoadedAdapter>() // the last used one last
    private val users = HashMap<String, Int>()
    private val leaving = HashSet<String>()
    private var current: LoadedAdapter? = null
    private var session: Session? = null
    private var closed = false

    /** The bundle as it is now. */
    @Volatile
    var bundle: Bundle = bundle
        private set

    /** The adapters that [use] takes; null, the base alone, comes besides. */
    val names: List<String> get() = lock.withLock { bundle.manifest.adapters.map { it.name } - leaving }

    /** The adapters in memory, the last used one last. */
    val loaded: List<String> get() = lock.withLock { kept.keys.filterNotNull() }

    /**
     * Runs one generation with an adapter, or with the base alone (null); the session must not outlive the block.
     *
     * Its KV cache is what the last generation left, if that used the same adapter. Waits while another thread generates.
     */
    fun <T> use(
        name: String?,
        block: (Session) -> T,
    ): T {
        refuseInside("one generation at a time: leave the session before using another")
        enter(name)
        try {
            generating.withLock {
                checkOpen()
                return block(switch(name))
            }
        } finally {
            leave(name)
        }
    }

    /** Adds an adapter, or replaces the one of that name, for the next [use]; the manifest changes in one step. */
    fun install(
        name: String,
        adapter: Adapter,
    ) = lock.withLock {
        checkOpen() // a bundle belongs to one bank at a time
        bundle = install(bundle, name, adapter, write)
        forget(name)
    }

    /** Removes an adapter and its file, once nobody uses it any more; from now on nobody can begin to. */
    fun remove(name: String) {
        refuseInside("an adapter cannot be removed from inside a session: leave the session first")
        lock.withLock {
            checkOpen()
            checkPresent(name)
            leaving.add(name)
            try {
                while (name in users) changed.await()
                bundle = remove(bundle, name)
                forget(name)
            } finally {
                leaving.remove(name)
            }
        }
    }

    /** Waits for the generation that runs, if one does, and lets the program go. */
    override fun close() {
        generating.withLock {
            lock.withLock {
                if (closed) return
                closed = true
                runner.close() // first: it has the current adapter in use
                (kept.values + listOfNotNull(current)).toSet().forEach { it.close() }
                kept.clear()
            }
        }
    }

    private fun enter(name: String?) {
        if (name == null) return
        lock.withLock {
            checkPresent(name)
            users[name] = (users[name] ?: 0) + 1
        }
    }

    private fun leave(name: String?) {
        if (name == null) return
        lock.withLock {
            val left = users.getValue(name) - 1
            if (left == 0) users.remove(name) else users[name] = left
            changed.signalAll()
        }
    }

    /** The session with this adapter in use; [generating] is held. */
    private fun switch(name: String?): Session =
        lock.withLock {
            val wanted = kept.remove(name) ?: runner.load(bundle.adapterFile(name))
            kept[name] = wanted
            shrink(wanted)
            if (wanted !== current || session == null) {
                val before = current
                current = null // should the swap fail half way
                session = null
                runner.use(wanted)
                current = wanted
                if (before != null && before !in kept.values) before.close()
            }
            val cached = session?.cached ?: IntArray(0)
            Session(bundle, runner, cached).also { session = it }
        }

    private fun shrink(wanted: LoadedAdapter) {
        val sizes = bundle.manifest.adapters.associate { it.name to it.fileBytes }
        while (kept.keys.sumOf { sizes[it] ?: 0L } > budget && kept.size > 1) {
            val oldest = kept.keys.first()
            close(kept.remove(oldest)!!, wanted)
        }
    }

    private fun forget(name: String) {
        kept.remove(name)?.let { close(it, null) }
    }

    /** Closes an adapter unless the program has it in use: then the next swap does. */
    private fun close(
        adapter: LoadedAdapter,
        wanted: LoadedAdapter?,
    ) {
        if (adapter !== current && adapter !== wanted) adapter.close()
    }

    private fun checkOpen() {
        if (closed) throw LordbaError("${bundle.folder}: the model was closed meanwhile; open it again")
    }

    private fun checkPresent(name: String) {
        if (name in leaving) throw LordbaError("${bundle.folder}: the adapter '$name' is being removed; use another")
        bundle.adapter(name)
    }

    private fun refuseInside(what: String) {
        if (generating.isHeldByCurrentThread) throw LordbaError(what)
    }

    companion object {
        const val DEFAULT_BUDGET = 64L shl 20
    }
}
