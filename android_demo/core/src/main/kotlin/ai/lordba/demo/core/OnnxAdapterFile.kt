package ai.lordba.demo.core

import java.io.ByteArrayOutputStream
import java.nio.ByteBuffer
import java.nio.ByteOrder

private const val ADAPTER_VERSION = 1

/**
 * An adapter as ONNX Runtime's own file, `.onnx_adapter`, for a base with this fingerprint: per module `<path>.signs`
 * and `<path>.scales` (lordba/onnx_adapter.py says what they hold).
 */
fun onnxAdapterBytes(
    adapter: Adapter,
    fingerprint: String,
    code: ScaleCode = adapter.scaleCode,
): ByteArray {
    val tensors =
        adapter.modules.toSortedMap().flatMap { (path, module) ->
            listOf("$path.signs" to signsOf(module, code), "$path.scales" to scalesOf(module, code))
        }
    return AdapterFlatbuffer().write(tensors, modelVersion(fingerprint))
}

/** The base's fingerprint "sha256:..." as the 31 bits that an adapter file has room for. */
fun modelVersion(fingerprint: String): Int =
    (fingerprint.removePrefix("sha256:").take(8).toLong(16) and 0x7fffffff).toInt()

private fun signsOf(
    module: SignModule,
    code: ScaleCode,
): RawTensor {
    // Two log4 codes share a byte, which tells even ranks only: an odd one gets one more row, whose scale is 0.
    val extra = ByteArray(if (code == ScaleCode.LOG4 && module.r % 2 == 1) packedWidth(module.dIn) else 0)
    return flat(DType.U8, listOf(module.aSigns.data, extra, module.bSigns.data))
}

private fun scalesOf(
    module: SignModule,
    code: ScaleCode,
): RawTensor =
    when (code) {
        module.sIn.code -> {
            val ranges = module.scales.mapNotNull { it.range?.data }
            flat(code.dtype, ranges + module.scales.map { it.values.data })
        }

        ScaleCode.FP32 -> {
            flat(DType.F32, module.scales.map { floatBytes(it.decode()) })
        }

        else -> {
            throw LordbaError("the program takes ${code.id} scales, the adapter has ${module.sIn.code.id}")
        }
    }

private fun flat(
    dtype: DType,
    parts: List<ByteArray>,
): RawTensor {
    val data =
        parts
            .fold(
                ByteArrayOutputStream(),
            ) { all, part -> all.apply { write(part, 0, part.size) } }
            .toByteArray()
    return RawTensor(dtype, listOf(data.size / dtype.bytes), data)
}

private fun floatBytes(values: FloatArray): ByteArray {
    val bytes = ByteBuffer.allocate(4 * values.size).order(ByteOrder.LITTLE_ENDIAN)
    values.forEach { bytes.putFloat(it) }
    return bytes.array()
}

/**
 * The flatbuffer that ONNX Runtime's schema for adapters describes: a table of three numbers and a vector of
 * parameters, each a table of name, dims (int64), element type and raw data. Both tables have the same four slots.
 */
private class AdapterFlatbuffer {
    private val out = ByteArrayOutputStream()

    fun write(
        tensors: List<Pair<String, RawTensor>>,
        modelVersion: Int,
    ): ByteArray {
        int(VTABLE + VTABLE_BYTES) // where the root table is
        out.write("TORT".toByteArray())
        listOf(VTABLE_BYTES, TABLE_BYTES, 4, 8, 12, 16).forEach { short(it) }
        table(FORMAT_VERSION, ADAPTER_VERSION, modelVersion, 4)
        int(tensors.size)
        val (sizes, vector) = tensors.map { parameterBytes(it.first, it.second) } to out.size()
        var position = align(vector + 4 * tensors.size)
        for ((i, size) in sizes.withIndex()) {
            int(position - (vector + 4 * i))
            position += size
        }
        pad { out.size() % 8 == 0 }
        tensors.forEach { (name, tensor) -> parameter(name, tensor) }
        return out.toByteArray()
    }

    private fun parameter(
        name: String,
        tensor: RawTensor,
    ) {
        val start = out.size()
        val (text, dims, data) = Layout.of(name)
        table(text - 4, dims - 8, TYPES.getValue(tensor.dtype), data - 16) // offsets count from their own slot
        pad { out.size() == start + text }
        int(name.length)
        out.write(name.toByteArray(Charsets.US_ASCII))
        pad { out.size() == start + dims }
        int(1)
        int(tensor.size)
        int(0) // the upper half of an int64
        pad { out.size() == start + data }
        int(tensor.data.size)
        out.write(tensor.data)
        pad { out.size() % 8 == 0 }
    }

    private fun parameterBytes(
        name: String,
        tensor: RawTensor,
    ) = align(Layout.of(name).data + 4 + tensor.data.size)

    private fun table(vararg slots: Int) {
        int(out.size() - VTABLE)
        slots.forEach { int(it) }
    }

    private fun pad(until: () -> Boolean) {
        while (!until()) out.write(0)
    }

    private fun int(value: Int) = repeat(4) { out.write(value shr 8 * it) }

    private fun short(value: Int) = repeat(2) { out.write(value shr 8 * it) }

    /** Where a parameter's parts begin after its table; vectors of int64 and data begin at multiples of 8. */
    private data class Layout(
        val text: Int,
        val dims: Int,
        val data: Int,
    ) {
        companion object {
            fun of(name: String): Layout {
                val dims = align(TABLE_BYTES + 4 + name.length + 1 + 4) - 4
                return Layout(TABLE_BYTES, dims, align(dims + 4 + 8 + 4) - 4)
            }
        }
    }

    private companion object {
        const val VTABLE = 8
        const val VTABLE_BYTES = 12
        const val TABLE_BYTES = 20
        const val FORMAT_VERSION = 1
        val TYPES = mapOf(DType.F32 to 1, DType.U8 to 2, DType.F16 to 10)

        fun align(position: Int) = (position + 7) / 8 * 8
    }
}
