package ai.lordba.demo.core

import java.io.File

/**
 * A loaded program with its KV cache, in its runtime; what `Runner` of lordba/runtime/session.py is.
 *
 * Callers see to it that one thread at a time calls it. Every method throws [LordbaError].
 */
interface Runner : AutoCloseable {
    /** How many tokens one run takes. */
    val longest: Int

    /** Reads an adapter's file (see [Bundle.adapterFile]) into the runtime's own form; null is the base alone. */
    fun load(file: File?): LoadedAdapter

    /** Switches to an adapter that [load] returned and that is not closed. The KV cache is void after it. */
    fun use(adapter: LoadedAdapter)

    /**
     * Runs token ids that follow the first [start] of the cache; 0 forgets it.
     *
     * Returns the last token's logits, float32 [vocabulary].
     */
    fun run(
        tokens: IntArray,
        start: Int,
    ): FloatArray
}

/** An adapter in memory; whoever loaded it closes it, and not before the runner uses another or is closed. */
interface LoadedAdapter : AutoCloseable

/** Opens the runner that a bundle's target and adapter mode need. */
interface RunnerFactory {
    /**
     * Loads the bundle's program, which takes seconds.
     *
     * [threads] 0 leaves the number to the runtime. Throws [LordbaError], also for an operator of `requires` that the
     * runtime lacks.
     */
    fun open(
        bundle: Bundle,
        threads: Int = 0,
    ): Runner
}
