package ai.lordba.demo.runtime

import ai.lordba.demo.core.Bundle
import ai.lordba.demo.core.LoadedAdapter
import ai.lordba.demo.core.LordbaError
import ai.lordba.demo.core.Runner
import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtException
import ai.onnxruntime.OrtLoraAdapter
import ai.onnxruntime.OrtSession
import ai.onnxruntime.TensorInfo
import java.io.File
import java.nio.ByteBuffer
import java.nio.FloatBuffer
import java.nio.LongBuffer

/**
 * Runs a bundle for ONNX Runtime, with our kernel from [library]; what `OnnxRunner` of lordba/runtime/onnx_runner.py is.
 *
 * The KV cache goes from one run's outputs to the next one's inputs, uncopied. [threads] 0 leaves their number to ONNX
 * Runtime. A library's name without a folder is looked up among the app's own.
 */
class OrtRunner(
    private val bundle: Bundle,
    threads: Int = 0,
    library: String = "liblordba_ort.so",
) : Runner {
    private val environment = OrtEnvironment.getEnvironment().apply { setTelemetry(false) }
    private val session = failing("cannot be loaded") { openSession(threads, library) }
    private val takesPositions = "position_ids" in session.inputNames

    /** The cache's inputs, and the outputs that become them in the next run. */
    private val caches =
        session.outputNames.drop(1).associateBy { it.replaceFirst("present", "past_key_values") }
    private var options: OrtSession.RunOptions? = null
    private var last: OrtSession.Result? = null

    override val longest = bundle.manifest.maxSeqLen

    init {
        val found = failing("cannot be read") { session.metadata.customMetadata["lordba.base_fingerprint"] }
        if (found != bundle.manifest.fingerprint) {
            close()
            throw LordbaError(
                "${bundle.program}: was made for the base $found, the manifest says ${bundle.manifest.fingerprint}; " +
                    "export the bundle again",
            )
        }
    }

    private fun openSession(
        threads: Int,
        library: String,
    ): OrtSession =
        OrtSession.SessionOptions().use { options ->
            if (threads > 0) options.setIntraOpNumThreads(threads)
            options.registerCustomOpLibrary(library)
            environment.createSession(bundle.program.path, options)
        }

    override fun load(file: File?): LoadedAdapter {
        if (file == null) return OrtAdapter(null)
        return OrtAdapter(failing("cannot take $file") { OrtLoraAdapter.create(file.path) })
    }

    override fun use(adapter: LoadedAdapter) {
        if (adapter !is OrtAdapter) throw LordbaError("an adapter that another runner loaded cannot be used here")
        failing("cannot take the adapter") {
            val fresh = OrtSession.RunOptions() // an adapter cannot be taken out of the old ones
            adapter.lora?.let { fresh.addActiveLoraAdapter(it) }
            options?.close()
            options = fresh
        }
        forget()
    }

    override fun run(
        tokens: IntArray,
        start: Int,
    ): FloatArray {
        val options = options ?: throw LordbaError("no adapter is in use; load one, or the base alone, first")
        if (start == 0) forget()
        if (start > 0 && last == null) throw LordbaError("${bundle.program}: the KV cache does not hold $start tokens")
        val own = ArrayList<OnnxTensor>() // made for this run alone
        try {
            return failing("failed") {
                val result = session.run(inputs(tokens, start, own), options)
                last?.close()
                last = result
                val logits = (result[0] as OnnxTensor).floatBuffer
                logits.position(logits.limit() - lastDimension(result))
                FloatArray(logits.remaining()).also { logits.get(it) }
            }
        } finally {
            own.forEach { it.close() }
        }
    }

    private fun inputs(
        tokens: IntArray,
        start: Int,
        own: MutableList<OnnxTensor>,
    ): Map<String, OnnxTensor> {
        val end = start + tokens.size
        val inputs = HashMap<String, OnnxTensor>()
        inputs["input_ids"] = row(LongArray(tokens.size) { tokens[it].toLong() })
        inputs["attention_mask"] = row(LongArray(end) { 1 })
        if (takesPositions) inputs["position_ids"] = row(LongArray(tokens.size) { start + it.toLong() })
        val past = last
        if (past == null) caches.keys.forEach { inputs[it] = emptyCache(it) }
        own += inputs.values
        if (past != null) caches.forEach { (input, output) -> inputs[input] = past[output].get() as OnnxTensor }
        return inputs
    }

    private fun row(values: LongArray): OnnxTensor =
        OnnxTensor.createTensor(environment, LongBuffer.wrap(values), longArrayOf(1, values.size.toLong()))

    /** A cache [1, heads, 0, channels]. */
    private fun emptyCache(name: String): OnnxTensor {
        val shape = (session.inputInfo.getValue(name).info as TensorInfo).shape
        val nothing: FloatBuffer = ByteBuffer.allocateDirect(0).asFloatBuffer()
        return OnnxTensor.createTensor(environment, nothing, longArrayOf(1, shape[1], 0, shape[3]))
    }

    private fun lastDimension(result: OrtSession.Result): Int = (result[0].info as TensorInfo).shape.last().toInt()

    private fun forget() {
        last?.close()
        last = null
    }

    override fun close() {
        forget()
        options?.close()
        options = null
        session.close()
    }

    private fun <T> failing(
        how: String,
        block: () -> T,
    ): T =
        try {
            block()
        } catch (error: OrtException) {
            throw LordbaError(
                "${bundle.program}: $how (${error.message}); the bundle was made with ${bundle.manifest.toolchain}",
                error,
            )
        }
}

/** An adapter as ONNX Runtime holds it; none is the base alone. */
private class OrtAdapter(
    val lora: OrtLoraAdapter?,
) : LoadedAdapter {
    override fun close() {
        lora?.close()
    }
}
