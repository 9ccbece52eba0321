package ai.lordba.demo.core

import java.io.ByteArrayOutputStream
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.security.MessageDigest

private const val ADAPTER_VERSION = 2
private const val INPUT = "adapter"

/**
 * An adapter's blob as ONNX Runtime's own file, `.onnx_adapter`, for a program over the base with this fingerprint and
 * with places for these modules, in this order (lordba/runtime/onnx_adapter.py).
 */
fun onnxAdapterBytes(
    blob: ByteArray,
    fingerprint: String,
    modules: List<String>,
): ByteArray {
    val tensor = RawTensor(DType.U8, listOf(blob.size), blob)
    return AdapterFlatbuffer().write(listOf(INPUT to tensor), modelVersion(fingerprint, modules))
}

/** The base and the order of the modules as the 31 bits that an adapter file has room for. */
fun modelVersion(
    fingerprint: String,
    modules: List<String>,
): Int {
    val text = (listOf(fingerprint) + modules).joinToString("\n")
    val digest = MessageDigest.getInstance("SHA-256").digest(text.toByteArray(Charsets.UTF_8))
    return digest.take(4).fold(0) { word, byte -> word shl 8 or (byte.toInt() and 0xff) } and 0x7fffffff
}

/** What stands for a layer without adapter, where a program knows no rank 0: rank 1 and scales of zero. */
fun noAdapter(
    dIn: Int,
    dOut: Int,
    code: ScaleCode,
): SignModule {
    fun zeros(
        rows: Int,
        columns: Int,
    ) = RawTensor(DType.U8, listOf(rows, columns), ByteArray(rows * columns))
    val (sIn, sMid, sOut) = listOf(dIn, 1, dOut).map { zeroScales(it, code) }
    return SignModule(zeros(1, packedWidth(dIn)), zeros(dOut, 1), sIn, sMid, sOut)
}

/** The module with scales in this code: its own, or fp32. Throws [LordbaError] for another. */
fun SignModule.withCode(code: ScaleCode): SignModule {
    if (code == sIn.code) return this
    if (code != ScaleCode.FP32) throw LordbaError("the program takes ${code.id} scales, the adapter has ${sIn.code.id}")
    val (sIn, sMid, sOut) = scales.map { floatScales(it.decode()) }
    return SignModule(aSigns, bSigns, sIn, sMid, sOut)
}

private fun zeroScales(
    n: Int,
    code: ScaleCode,
): EncodedScales {
    val stored = code.storedLength(n)
    val ones = RawTensor(DType.F16, listOf(2), byteArrayOf(0, 0x3c, 0, 0x3c))
    val values = RawTensor(code.dtype, listOf(stored), ByteArray(stored * code.dtype.bytes))
    return EncodedScales(code, n, values, ones.takeIf { code.isCoded })
}

private fun floatScales(values: FloatArray): EncodedScales {
    val bytes = ByteBuffer.allocate(4 * values.size).order(ByteOrder.LITTLE_ENDIAN)
    values.forEach { bytes.putFloat(it) }
    return EncodedScales(ScaleCode.FP32, values.size, RawTensor(DType.F32, listOf(values.size), bytes.array()), null)
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
