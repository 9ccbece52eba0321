package ai.lordba.demo.core

import java.io.File

/** What a run of fine-tuning is told; the learning rate is that of the latent factors. */
data class TrainingSettings(
    val learningRate: Float = 1e-3f,
    val momentum: Float = 0.9f,
    val seed: Long = 0,
)

/**
 * The training program of a bundle with the latents of one adapter; every method throws [LordbaError].
 *
 * Callers see to it that one thread at a time calls it, and close it only between calls.
 */
interface Trainer : AutoCloseable {
    /** The longest token sequence that [step] takes. */
    val longest: Int

    /**
     * One optimizer step on a token sequence, 2 to [longest] ids, each token being predicted from those before it.
     *
     * Returns the loss before the step: cross-entropy, nats per token.
     */
    fun step(tokens: IntArray): Float

    /** Writes the latents as signs and scales: an adapter folder as docs/format.md has it, at a path that is free. */
    fun pack(folder: File)
}

/** Opens a [Trainer]. */
interface TrainerFactory {
    /** Whether the bundle holds a training program that this app can run; if not, the reason in one sentence. */
    fun whyNot(bundle: Bundle): String?

    /** Loads the training program. [start] is the runtime's file of the adapter to go on from, null starts from nothing. */
    fun open(
        bundle: Bundle,
        start: File?,
        settings: TrainingSettings,
    ): Trainer
}
