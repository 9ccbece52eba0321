package ai.lordba.demo.core

import com.google.gson.JsonArray
import java.io.File

private const val REQUEST_NAME = "request.json"
private const val CHECKPOINT_NAME = "checkpoint"

/** What a run of fine-tuning over the base with this fingerprint leaves, so that it can go on after a kill. */
class FineTuneFiles(
    root: File,
    fingerprint: String,
) {
    private val folder = File(root, fingerprint.removePrefix("sha256:").take(16))
    private val request = File(folder, REQUEST_NAME)
    private val checkpoint = File(folder, CHECKPOINT_NAME)

    /** The run that did not end, or null. */
    fun pending(): FineTuneRequest? {
        if (!request.isFile) return null
        return try {
            val json = parseJsonObject(request)
            FineTuneRequest(
                json.string("text"),
                json.string("adapter"),
                json.textOrNull("start"),
                json.int("steps"),
                json.int("tokens_per_step"),
                TrainingSettings(json.number("learning_rate").toFloat(), json.long("seed")),
            )
        } catch (error: JsonShapeError) {
            null // of another version of the app
        }
    }

    fun begin(wanted: FineTuneRequest) {
        discard()
        val json =
            jsonObject(
                "text" to wanted.text,
                "adapter" to wanted.adapter,
                "start" to wanted.start,
                "steps" to wanted.steps,
                "tokens_per_step" to wanted.tokensPerStep,
                "learning_rate" to wanted.settings.learningRate,
                "seed" to wanted.settings.seed,
            )
        newFile(request) { it.write(json.toText(1).toByteArray()) }
    }

    fun save(
        trainer: Trainer,
        losses: List<Float>,
    ) = trainer.save(checkpoint, JsonArray().apply { losses.forEach { add(it) } }.toString())

    /** Puts the trainer where the last checkpoint was; returns the losses so far, none if there is no checkpoint. */
    fun load(trainer: Trainer): List<Float> {
        if (!checkpoint.isFile) return emptyList()
        val note = trainer.load(checkpoint)
        return try {
            (parseJson(note) as JsonArray).map { it.asFloat }
        } catch (error: JsonShapeError) {
            throw LordbaError("$checkpoint: its note is no list of losses (${error.message}); start a new run", error)
        }
    }

    /** Forgets the run. */
    fun discard() {
        request.delete() // first: without it nothing goes on
        checkpoint.delete()
        folder.delete()
    }
}
