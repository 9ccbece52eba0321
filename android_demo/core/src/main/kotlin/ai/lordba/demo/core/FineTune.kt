package ai.lordba.demo.core

import java.io.File
import java.util.Random

/** What a screen shows of a run of fine-tuning. */
sealed class FineTuneState {
    object Idle : FineTuneState()

    /** The text is cut and the training program loads. */
    object Preparing : FineTuneState()

    /** [losses] has one value per step done, nats per token. */
    data class Running(
        val steps: Int,
        val losses: List<Float>,
        val tokens: Int,
    ) : FineTuneState()

    /** Packing to signs and installing; it cannot be cancelled any more. */
    data class Saving(
        val losses: List<Float>,
    ) : FineTuneState()

    data class Saved(
        val adapter: String,
        val losses: List<Float>,
    ) : FineTuneState()

    /** Ended by the user; nothing was written. */
    data class Cancelled(
        val losses: List<Float>,
    ) : FineTuneState()

    data class Failed(
        val message: String,
        val losses: List<Float>,
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
 * One run of fine-tuning: text in, a new adapter of the bundle out.
 *
 * [run] works in the thread that calls it and tells [onState] of every change; [cancel] may come from any thread and
 * takes effect before the next step. Whatever happens, the bundle has the new adapter entirely or not at all.
 */
class FineTune(
    private val bank: AdapterBank,
    private val tokenizer: Tokenizer,
    private val trainers: TrainerFactory,
    private val scratch: File,
    private val onState: (FineTuneState) -> Unit,
) {
    @Volatile
    private var cancelled = false

    /** Ends the run before its next step; a run that is saving already is saved. */
    fun cancel() {
        cancelled = true
    }

    /** Runs to the end and returns the state that it ended in; throws nothing that the user can mend. */
    fun run(request: FineTuneRequest): FineTuneState {
        val losses = ArrayList<Float>()
        val end =
            try {
                train(request, losses)
            } catch (error: LordbaError) {
                FineTuneState.Failed(error.message ?: "failed", losses.toList())
            }
        onState(end)
        return end
    }

    private fun train(
        request: FineTuneRequest,
        losses: MutableList<Float>,
    ): FineTuneState {
        onState(FineTuneState.Preparing)
        check(request)
        trainers.whyNot(bank.bundle)?.let { throw LordbaError(it) }
        val start = request.start?.let { bank.bundle.adapterFile(it) }
        return trainers.open(bank.bundle, start, request.settings).use { trainer ->
            val windows = windows(tokenizer.encodePlain(request.text), minOf(request.tokensPerStep, trainer.longest))
            val order = epochs(windows.size, request.settings.seed).iterator()
            for (step in 1..request.steps) {
                if (cancelled) return FineTuneState.Cancelled(losses.toList())
                val loss = trainer.step(windows[order.next()])
                if (loss.isNaN() || loss.isInfinite()) {
                    throw LordbaError("the loss became $loss at step $step; take a smaller learning rate")
                }
                losses.add(loss)
                onState(FineTuneState.Running(request.steps, losses.toList(), windows.sumOf { it.size }))
            }
            if (cancelled) return FineTuneState.Cancelled(losses.toList())
            onState(FineTuneState.Saving(losses.toList()))
            save(trainer, request.adapter)
            FineTuneState.Saved(request.adapter, losses.toList())
        }
    }

    private fun save(
        trainer: Trainer,
        name: String,
    ) {
        val folder = File(scratch, "packed-$name")
        folder.deleteRecursively() // of a run that was killed
        try {
            trainer.pack(folder)
            bank.install(name, loadAdapter(folder))
        } finally {
            folder.deleteRecursively()
        }
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
