package ai.lordba.demo.core

import java.io.File
import java.util.Collections

/** A runtime for tests: after token t it expects t + 1, or t + 1 + (bytes of the adapter's file) with an adapter. */
class FakeRunner(
    private val vocabulary: Int = 400,
    override val longest: Int = 8,
) : Runner {
    val log: MutableList<String> = Collections.synchronizedList(ArrayList())
    val open = HashSet<FakeAdapter>()
    var closed = false
    private var current: FakeAdapter? = null
    private var length = 0

    inner class FakeAdapter(
        val name: String,
        val shift: Int,
    ) : LoadedAdapter {
        override fun close() {
            check(this !== current || closed) { "$name is in use" }
            check(open.remove(this)) { "$name was closed before" }
            log.add("close $name")
        }
    }

    override fun load(file: File?): LoadedAdapter {
        val adapter = FakeAdapter(file?.name ?: "none", file?.length()?.toInt() ?: 0)
        log.add("load ${adapter.name}")
        return adapter.also { open.add(it) }
    }

    override fun use(adapter: LoadedAdapter) {
        check(adapter in open)
        current = adapter as FakeAdapter
        length = 0
        log.add("use ${adapter.name}")
    }

    override fun run(
        tokens: IntArray,
        start: Int,
    ): FloatArray {
        check(tokens.size <= longest && (start == 0 || start == length)) { "run at $start after $length" }
        length = start + tokens.size
        log.add("run ${tokens.size} at $start")
        return FloatArray(vocabulary).also { it[(tokens.last() + 1 + current!!.shift) % vocabulary] = 1f }
    }

    override fun close() {
        closed = true
    }
}

/** A trainer for tests: its loss falls with each step, and what it packs is the golden adapter. */
class FakeTrainers(
    private val problem: String? = null,
    private val divergesAt: Int = Int.MAX_VALUE,
    private val beforeStep: (Int) -> Unit = {},
) : TrainerFactory {
    val seen = ArrayList<List<Int>>()
    var start: List<Factors?>? = null
    var closed = 0

    override fun whyNot(bundle: Bundle): String? = problem

    override fun open(
        bundle: Bundle,
        start: List<Factors?>?,
        settings: TrainingSettings,
    ): Trainer {
        this.start = start
        return FakeTrainer()
    }

    private inner class FakeTrainer : Trainer {
        override val longest = 16
        private var steps = 0

        override fun step(tokens: IntArray): Float {
            check(tokens.size in 2..longest)
            beforeStep(steps)
            seen.add(tokens.toList())
            steps++
            return if (steps == divergesAt) Float.NaN else 4f / steps
        }

        override fun pack() = loadAdapter(Golden.file("adapter-log4")).modules

        override fun save(
            file: File,
            note: String,
        ) = newFile(file) { it.write("$steps $note".toByteArray()) }

        override fun load(file: File): String {
            val (count, note) = file.readText().split(" ", limit = 2)
            steps = count.toInt()
            return note
        }

        override fun close() {
            closed++
        }
    }
}

/** A stop-watch that each look moves on by one millisecond. */
class FakeClock : Clock {
    private var now = 0L

    override fun nanoTime(): Long {
        now += 1_000_000
        return now
    }
}
