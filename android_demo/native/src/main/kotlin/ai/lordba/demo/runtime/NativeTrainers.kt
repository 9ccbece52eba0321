package ai.lordba.demo.runtime

import ai.lordba.demo.core.Bundle
import ai.lordba.demo.core.DType
import ai.lordba.demo.core.EncodedScales
import ai.lordba.demo.core.Factors
import ai.lordba.demo.core.LordbaError
import ai.lordba.demo.core.RawTensor
import ai.lordba.demo.core.ScaleCode
import ai.lordba.demo.core.SignModule
import ai.lordba.demo.core.Trainer
import ai.lordba.demo.core.TrainerFactory
import ai.lordba.demo.core.TrainingSettings
import ai.lordba.demo.core.packedWidth
import com.google.gson.JsonObject
import java.io.File

/** Fine-tuning on the phone, by the training program that an export with --train adds to a bundle. */
object NativeTrainers : TrainerFactory {
    override fun whyNot(bundle: Bundle): String? {
        val training = trainingOf(bundle)
        return when {
            training == null -> {
                "${bundle.folder.name} holds no training program; export it with --target executorch --train fused"
            }

            training.get("form")?.asString != "fused" -> {
                "${bundle.folder.name} holds a training program of another form; export it with --train fused"
            }

            else -> {
                missingLibrary()
            }
        }
    }

    override fun open(
        bundle: Bundle,
        start: List<Factors?>?,
        settings: TrainingSettings,
    ): Trainer {
        whyNot(bundle)?.let { throw LordbaError(it) }
        val program = File(bundle.folder, trainingOf(bundle)!!.get("program").asString)
        val trainer = ProgramTrainer(TrainingProgram.open(program.path, settings.seed), bundle, settings)
        try {
            trainer.begin(start)
        } catch (error: LordbaError) {
            trainer.close()
            throw error
        }
        return trainer
    }

    private fun trainingOf(bundle: Bundle): JsonObject? = bundle.manifest.record.get("training") as? JsonObject

    private fun missingLibrary(): String? =
        try {
            TrainingProgram.close(0)
            null
        } catch (error: LinkageError) {
            "this build of the app cannot train (${error.message}); build it as android_demo/README.md says"
        }
}

private class ProgramTrainer(
    private var trainer: Long,
    private val bundle: Bundle,
    private val settings: TrainingSettings,
) : Trainer {
    private val sizes = TrainingProgram.modules(trainer).toList().chunked(3)

    override val longest = TrainingProgram.longest(trainer)

    fun begin(start: List<Factors?>?) {
        val paths = bundle.manifest.modules
        if (paths.size != sizes.size) {
            throw LordbaError(
                "the training program has ${sizes.size} modules, the manifest ${paths.size}; export it again",
            )
        }
        if (start != null && start.size != sizes.size) {
            throw LordbaError("the adapter has ${start.size} modules, the training program ${sizes.size}; take another")
        }
        for ((index, size) in sizes.withIndex()) {
            val factors = start?.get(index)
            if (start == null || size[0] == 0) continue
            if (factors == null || listOf(factors.r, factors.dIn, factors.dOut) != size) {
                throw LordbaError(
                    "${paths[index]}: the adapter has rank ${factors?.r ?: 0}, the training program ${size[0]}; " +
                        "start from another adapter or from nothing",
                )
            }
            TrainingProgram.setFactors(trainer, index, factors.a, factors.b)
        }
    }

    override fun step(tokens: IntArray): Float = TrainingProgram.step(open(), tokens, settings.learningRate)

    override fun pack(): Map<String, SignModule> =
        bundle.manifest.modules
            .withIndex()
            .filter { (index, path) -> path != null && sizes[index][0] > 0 }
            .associate { (index, path) -> path!! to signModule(sizes[index], TrainingProgram.pack(open(), index)) }

    private fun signModule(
        size: List<Int>,
        parts: Array<ByteArray>,
    ): SignModule {
        val (r, dIn, dOut) = size
        val scales =
            listOf(dIn, r, dOut).mapIndexed { i, n ->
                val codes = RawTensor(DType.U8, listOf(ScaleCode.LOG4.storedLength(n)), parts[2 + i])
                val range = RawTensor(DType.F16, listOf(2), parts[5].copyOfRange(4 * i, 4 * i + 4))
                EncodedScales(ScaleCode.LOG4, n, codes, range)
            }
        return SignModule(
            RawTensor(DType.U8, listOf(r, packedWidth(dIn)), parts[0]),
            RawTensor(DType.U8, listOf(dOut, packedWidth(r)), parts[1]),
            scales[0],
            scales[1],
            scales[2],
        )
    }

    override fun save(
        file: File,
        note: String,
    ) = TrainingProgram.save(open(), file.path, note)

    override fun load(file: File): String = TrainingProgram.load(open(), file.path)

    override fun close() {
        TrainingProgram.close(trainer)
        trainer = 0
    }

    private fun open(): Long = if (trainer != 0L) trainer else throw LordbaError("the trainer is closed; open it again")
}
