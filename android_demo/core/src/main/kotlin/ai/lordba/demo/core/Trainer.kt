package ai.lordba.demo.core

import java.io.File

/** What a run of fine-tuning is told; the learning rate is that of the latent factors, by AdamW. */
data class TrainingSettings(
    val learningRate: Float = 1e-3f,
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

    /** One optimizer step on 2 to [longest] token ids; returns the loss before it, nats per predicted token. */
    fun step(tokens: IntArray): Float

    /** The latents as signs and log4 scales, by the module's path. */
    fun pack(): Map<String, SignModule>

    /** Writes a checkpoint, complete or not at all: latents, the optimizer's state and a note of the caller's. */
    fun save(
        file: File,
        note: String,
    )

    /** Goes on from a checkpoint and returns its note. */
    fun load(file: File): String
}

/** Opens a [Trainer]. */
interface TrainerFactory {
    /** Null if the bundle holds a training program that this app can run, else the reason in one sentence. */
    fun whyNot(bundle: Bundle): String?

    /**
     * Loads the training program. The latents begin as [start], one entry per module of the manifest in its order, or,
     * if null, as a LoRA's do.
     */
    fun open(
        bundle: Bundle,
        start: List<Factors?>?,
        settings: TrainingSettings,
    ): Trainer
}

/** An adapter of one layer as float factors: its update is B A x. [a] is [r, dIn], [b] is [dOut, r], row-major. */
class Factors(
    val r: Int,
    val dIn: Int,
    val dOut: Int,
    val a: FloatArray,
    val b: FloatArray,
)
