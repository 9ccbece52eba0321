package ai.lordba.demo.thin

import ai.lordba.demo.core.AdapterBank
import ai.lordba.demo.core.Bundle
import ai.lordba.demo.core.BundleListing
import ai.lordba.demo.core.BundleStore
import ai.lordba.demo.core.Chat
import ai.lordba.demo.core.Device
import ai.lordba.demo.core.LatencyPlan
import ai.lordba.demo.core.LatencyRun
import ai.lordba.demo.core.LordbaError
import ai.lordba.demo.core.PromptStyle
import ai.lordba.demo.core.Series
import ai.lordba.demo.core.StreamDecoder
import ai.lordba.demo.core.Tokenizer
import ai.lordba.demo.core.jsonObject
import ai.lordba.demo.core.median
import ai.lordba.demo.core.overhead
import ai.lordba.demo.core.profileJson
import ai.lordba.demo.core.readBundle
import ai.lordba.demo.runtime.NativeRunners
import java.io.File
import java.util.concurrent.Executors

/** What the screen shows; immutable. */
data class State(
    val bundles: List<BundleListing> = emptyList(),
    val open: Bundle? = null,
    val busy: Boolean = false,
    /** What is going on, what came of it, or what went wrong. */
    val status: String = "",
    val answer: String = "",
)

/**
 * The work behind the screen: one thread that opens bundles, generates and measures; it outlives the Activity.
 *
 * [listen] is called on that thread, or on the caller's, with every new state.
 */
class Engine(
    private val store: BundleStore,
) {
    private class Opened(
        val bank: AdapterBank,
        val tokenizer: Tokenizer,
    )

    private val worker = Executors.newSingleThreadExecutor { Thread(it, "lordba").apply { isDaemon = true } }
    private var opened: Opened? = null // of the worker alone

    @Volatile
    private var stopping = false

    @Volatile
    var state = State()
        private set

    @Volatile
    var listen: (State) -> Unit = {}

    /** Looks for bundles. */
    fun refresh() =
        work("looking for bundles") {
            val found = store.list()
            show { copy(bundles = found, status = if (found.isEmpty()) "no bundle yet: push one with adb" else "") }
        }

    /** Checks every file of a bundle and loads its program. */
    fun open(listing: BundleListing) =
        work("opening ${listing.folder.name}") {
            listing.problem?.let { throw LordbaError(it) }
            opened?.bank?.close()
            opened = null
            show { copy(open = null, answer = "") }
            val bundle =
                readBundle(listing.folder) { done, all ->
                    show { copy(status = "checking ${listing.folder.name}: ${done * 100 / maxOf(all, 1)} %") }
                }
            val path = bundle.manifest.tokenizer ?: throw LordbaError("${bundle.folder}: holds no tokenizer")
            val tokenizer = Tokenizer.read(File(bundle.folder, path))
            show { copy(status = "loading ${bundle.manifest.baseName}") }
            val runner = NativeRunners.open(bundle)
            opened = Opened(AdapterBank(bundle, runner), tokenizer)
            show { copy(open = bundle, status = "${bundle.manifest.baseName}, ${bundle.manifest.target}") }
        }

    /** Continues a prompt with an adapter, or with the base alone (null). */
    fun generate(
        adapter: String?,
        prompt: String,
        style: PromptStyle,
        most: Int = MOST_TOKENS,
    ) = work("reading the prompt") {
        val opened = opened ?: throw LordbaError("no bundle is open; pick one first")
        show { copy(answer = "") }
        val generated =
            opened.bank.use(adapter) { session ->
                val tokens = Chat(style = style).ask(prompt).prompt(opened.tokenizer, session.maxSeqLen - 1)
                val decoder = StreamDecoder(opened.tokenizer)
                val done =
                    session.generate(tokens, most) { token ->
                        decoder.add(token)
                        show { copy(answer = decoder.text, status = "writing") }
                        !stopping
                    }
                decoder.finish()
                show { copy(answer = decoder.text) }
                done
            }
        val speed = generated.tokensPerSecond?.let { "%.1f tokens/s".format(it) } ?: "one token"
        val prefill = "prefill of ${generated.prefillTokens} tokens in ${generated.prefillNanos / 1000000} ms"
        show { copy(status = "$speed, $prefill") }
    }

    /** Measures the base and an adapter in turn, and writes the profile file where adb can read it. */
    fun measure(
        adapter: String,
        device: Device,
        folder: File,
    ) = work("measuring") {
        val opened = opened ?: throw LordbaError("no bundle is open; pick one first")
        val plan = LatencyPlan(listOf(adapter))
        val series =
            LatencyRun(opened.bank, plan).run { round, rounds ->
                show { copy(status = "measuring, round $round of $rounds") }
                !stopping
            }
        if (series.isEmpty()) throw LordbaError("stopped before anything was measured")
        val file = File(folder, "profile-${opened.bank.bundle.folder.name}-$adapter.json")
        val partial = File(folder, file.name + ".partial")
        val conditions = jsonObject("rounds" to plan.rounds, "warm_up" to plan.warmUp, "stopped" to stopping)
        partial.writeText(profileJson(series, device, jsonObject("app" to "thin"), conditions))
        if (!partial.renameTo(file)) throw LordbaError("$file: cannot be written")
        show { copy(answer = tableOf(series), status = file.path) }
    }

    /** Ends what is going on, after the token or round that runs. */
    fun stop() {
        stopping = true
    }

    private fun work(
        what: String,
        block: () -> Unit,
    ) {
        if (state.busy) return
        show { copy(busy = true, status = what) }
        stopping = false
        worker.execute {
            try {
                block()
            } catch (error: LordbaError) {
                show { copy(status = error.message ?: "failed") }
            } catch (error: RuntimeException) {
                // ours; the app stays up and says it
                show { copy(status = "a fault in the app: $error") }
            } catch (error: OutOfMemoryError) {
                show { copy(status = "no memory left: ${error.message}") }
            } finally {
                show { copy(busy = false) }
            }
        }
    }

    private fun show(change: State.() -> State) {
        val next = synchronized(this) { state.change().also { state = it } }
        listen(next)
    }

    private fun tableOf(series: List<Series>): String =
        series.joinToString("\n") { row ->
            val base = series.find { it.adapter == "none" && it.conditions == row.conditions && it !== row }
            val over = base?.let { overhead(row.samples, it.samples) }
            val said = if (over == null) "" else over.percent?.let { " (%+.1f %%)".format(it) } ?: " (within the noise)"
            "%-8s %-10s %8.2f ms%s".format(row.phase, row.adapterName ?: "base", median(row.samples), said)
        }

    private companion object {
        const val MOST_TOKENS = 200
    }
}
