package ai.lordba.demo.runtime

/** The most memory that this process holds in RAM, mapped files included, from now to [stop]. */
class PeakMemory : AutoCloseable {
    private var watch = ExecuTorch.openPeakMemory()

    /** Ends the watch and returns the most bytes seen, one look per millisecond. */
    fun stop(): Long {
        check(watch != 0L) { "the watch has ended" }
        return ExecuTorch.stopPeakMemory(watch).also { close() }
    }

    override fun close() {
        ExecuTorch.closePeakMemory(watch)
        watch = 0
    }
}
