package ai.lordba.demo.core

import java.io.File
import java.util.Random

/** What a screen shows of a run of fine-tuning. */
sealed class FineTuneState {
    /** The loss of each step done, nats per token. */
    abstract val losses: List<Float>

    object Idle : FineTuneState() {
        override val losses = emptyList<Float>()
    }

    /** The text is cut and the training program loads. */
    object Preparing : FineTuneState() {
        override val losses = emptyList<Float>()
    }

    /** [tokens] are those of the text that is learned. */
    data class Running(
        val steps: Int,
        override val losses: List<Float>,
        val tokens: Int,
    ) : FineTuneState()

    /** Packing to signs and installing; it cannot be cancelled any more. */
    data class Saving(
        override val losses: List<Float>,
    ) : FineTuneState()

    data class Saved(
        val adapter: String,
        override val losses: List<Float>,
    ) : FineTuneState()

    /** Ended by the user; nothing was written. */
    data class Cancelled(
        override val losses: List<Float>,
    ) : FineTuneState()

    /** Ended by the app; [FineTune.resume] goes on. */
    data class Paused(
        override val losses: List<Float>,
    ) : FineTuneState()

    data class Failed(
        val message: String,
        override val losses: List<Float>,
    ) : FineTuneState()

    val isBusy: Boolean get() = this is Preparing || this is Running || this is Saving
}

/** What the user asked for; [start] is an adapter of the bundle to go on from, null starts from nothing. */
data class FineTuneRequest(
    val text: String,
    val adapter: String,
    val start: String? = null,
    val steps: Int = 40,
    val tokensPerStep: Int = 128,
    val settings: TrainingSettings = TrainingSettings(),
)

/**
 * Fine-tuning: text in, a new adapter of the bundle out.
 *
 * [run] and [resume] work in the thread that calls them and tell [onState] of every change; [cancel] may come from any
 * thread and takes effect before the next step. However it ends, killed included, the bundle has the new adapter
 * entirely or not at all; a run that was killed goes on from its last checkpoint, which lies in [scratch].
 */
class FineTune(
    private val bank: AdapterBank,
    private val tokenizer: Tokenizer,
    private val trainers: TrainerFactory,
    scratch: File,
    private val checkpointSteps: Int = 10,
    private val onState: (FineTuneState) -> Unit,
) {
    private val files = FineTuneFiles(scratch, bank.bundle.manifest.fingerprint)

    private enum class Wish { GO_ON, PAUSE, CANCEL }

    @Volatile
    private var wish = Wish.GO_ON

    /** Ends the run before its next step; a run that is saving already is saved. */
    fun cancel() {
        wish = Wish.CANCEL
    }

    /** Ends the run before its next step with a checkpoint. */
    fun pause() {
        if (wish == Wish.GO_ON) wish = Wish.PAUSE
    }

    /** Runs to the end and returns the state that it ended in; mistakes of the user are [FineTuneState.Failed]. */
    fun run(request: FineTuneRequest): FineTuneState =
        finish { losses ->
            check(request)
            files.begin(request)
            train(request, losses, fresh = true)
        }

    /** Goes on with a run that did not end, from its last checkpoint; see [FineTuneFiles.pending]. */
    fun resume(): FineTuneState =
        finish { losses ->
            val request =
                files.pending()
                    ?: throw LordbaError("there is no run to go on with; start a new one")
            check(request)
            train(request, losses, fresh = false)
        }

    private fun finish(work: (MutableList<Float>) -> FineTuneState): FineTuneState {
        val losses = ArrayList<Float>()
        val end =
            try {
                onState(FineTuneState.Preparing)
                work(losses).also { if (it !is FineTuneState.Paused) files.discard() }
            } catch (error: LordbaError) {
                FineTuneState.Failed(error.message ?: "failed", losses.toList())
            }
        onState(end)
        return end
    }

    private fun train(
        request: FineTuneRequest,
        losses: MutableList<Float>,
        fresh: Boolean,
    ): FineTuneState {
        trainers.whyNot(bank.bundle)?.let { throw LordbaError(it) }
        val start = request.start?.let { blobFactors(blobOf(bank.bundle.adapterFile(it)!!)) }
        trainers.open(bank.bundle, start, request.settings).use { trainer ->
            if (!fresh) losses.addAll(files.load(trainer))
            val windows = windows(tokenizer.encodePlain(request.text), minOf(request.tokensPerStep, trainer.longest))
            val order = epochs(windows.size, request.settings.seed).drop(losses.size).iterator()
            while (losses.size < request.steps && wish == Wish.GO_ON) {
                losses.add(finite(trainer.step(windows[order.next()]), losses.size + 1))
                onState(FineTuneState.Running(request.steps, losses.toList(), windows.sumOf { it.size }))
                if (losses.size % checkpointSteps == 0) files.save(trainer, losses)
            }
            if (wish == Wish.CANCEL) return FineTuneState.Cancelled(losses.toList())
            if (losses.size < request.steps) {
                files.save(trainer, losses)
                return FineTuneState.Paused(losses.toList())
            }
            onState(FineTuneState.Saving(losses.toList()))
            val manifest = bank.bundle.manifest
            bank.install(
                request.adapter,
                Adapter(trainer.pack(), ScaleCode.LOG4, manifest.baseName, manifest.fingerprint),
            )
            return FineTuneState.Saved(request.adapter, losses.toList())
        }
    }

    private fun finite(
        loss: Float,
        step: Int,
    ): Float {
        if (!loss.isNaN() && !loss.isInfinite()) return loss
        throw LordbaError("the loss became $loss at step $step; take a smaller learning rate")
    }

    private fun check(request: FineTuneRequest) {
        if (!isAdapterName(request.adapter)) {
            throw LordbaError("the name '${request.adapter}' is no usable file name; take letters, digits, - _ and .")
        }
        if (request.adapter in bank.names) {
            throw LordbaError("there is an adapter '${request.adapter}' already; take another name")
        }
        if (request.steps < 1 || request.tokensPerStep < 2) {
            throw LordbaError("at least one step and two tokens per step are needed; take larger numbers")
        }
    }
}

/** Cuts tokens into windows of [length], the last one shorter; throws [LordbaError] if there is nothing to learn from. */
fun windows(
    tokens: IntArray,
    length: Int,
): List<IntArray> {
    val windows = tokens.indices.step(length).map { tokens.copyOfRange(it, minOf(it + length, tokens.size)) }
    val usable = windows.filterIndexed { i, window -> window.size >= if (i == 0) 2 else length / 2 }
    if (usable.isEmpty()) throw LordbaError("the text has ${tokens.size} tokens; paste some more text")
    return usable
}

/** Indices below n for ever: every one once, in a new random order each time round; the same for the same seed. */
fun epochs(
    n: Int,
    seed: Long,
): Sequence<Int> {
    val random = Random(seed)
    return generateSequence { (0 until n).shuffled(random) }.flatten()
}
